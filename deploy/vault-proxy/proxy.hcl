# Vault Proxy: one login and one lease for all programs of a server.
#
#   vault proxy -config=proxy.hcl
#   VAULT_ADDR=http://127.0.0.1:8100 vault read -field=api_key openai/creds/my-app
#
# The cache answers every read of the same path with the same lease and renews
# it. Anyone who can reach the listener has the rights of the Proxy's login: keep
# it on loopback or on a socket.

vault {
  address = "https://vault.example.com:8200"
}

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "/etc/openai-agent/role-id"
      secret_id_file_path                 = "/etc/openai-agent/secret-id"
      remove_secret_id_file_after_reading = false
    }
  }
}

api_proxy {
  use_auto_auth_token = "force"
}

cache {}

listener "tcp" {
  address     = "127.0.0.1:8100"
  tls_disable = true

  # A web page can make a browser send requests to loopback, but cannot add this
  # header. Vault's clients send it; other clients send X-Vault-Request: true.
  require_request_header = true
}
