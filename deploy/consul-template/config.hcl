# consul-template: keeps a working key in a file, where a token is at hand and
# the Agent's login is not needed.
#
#   VAULT_TOKEN=… consul-template -config=config.hcl
#
# It renews its token and the lease, and reads a new credential shortly before
# the old one ends.

vault {
  address      = "https://vault.example.com:8200"
  renew_token  = true
  unwrap_token = false

  retry {
    # For ever: a file that nobody updates is worse than a late one.
    attempts = 0
  }
}

template {
  contents    = "{{ with secret \"openai/creds/my-app\" }}{{ .Data.api_key }}{{ end }}"
  destination = "/run/openai/api-key"
  perms       = "0600"

  # Tells the program that the key has changed:
  # exec { command = ["systemctl", "reload", "my-app"] }
}
