# Vault Agent: keeps a working key in a file.
#
#   vault agent -config=agent.hcl
#
# The Agent renews the lease for as long as it can and reads a new credential
# shortly before it ends, so that the file always holds a key that works. Read
# the file for each request, or at least after a 401; do not keep the key.

vault {
  address = "https://vault.example.com:8200"
}

auto_auth {
  method "approle" {
    config = {
      role_id_file_path   = "/etc/openai-agent/role-id"
      secret_id_file_path = "/etc/openai-agent/secret-id"
      # It is read again after a restart of the Agent.
      remove_secret_id_file_after_reading = false
    }
  }
}

template_config {
  # Without this the Agent gives up after a few failures and the file grows old
  # in silence. As a service that is restarted, it tries again from the start.
  exit_on_retry_failure = true
}

template {
  destination = "/run/openai/api-key"
  perms       = "0600"
  contents    = "{{ with secret \"openai/creds/my-app\" }}{{ .Data.api_key }}{{ end }}"
}
