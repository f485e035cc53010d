# consul-template: keeps a working key in a file, with a token that it is given.
#
#   VAULT_TOKEN=… consul-template -config=config.hcl
#
# It renews its token and the lease, and reads a new credential before the old
# one ends. Use a periodic token.

vault {
  address      = "https://vault.example.com:8200"
  renew_token  = true
  unwrap_token = false

  retry {
    # Retry without limit: without updates, the key in the file expires.
    attempts = 0
  }
}

template {
  contents    = "{{ with secret \"openai/creds/my-app\" }}{{ .Data.api_key }}{{ end }}"
  destination = "/run/openai/api-key"
  perms       = "0600"

  # To notify a program of a new key:
  # exec { command = ["systemctl", "reload", "my-app"] }
}
