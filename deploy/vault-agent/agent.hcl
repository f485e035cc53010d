# Vault Agent: keeps a working key in a file.
#
#   vault agent -config=agent.hcl
#
# The Agent renews the lease as long as possible and reads a new credential
# before it ends. Programs read the file for each request.

vault {
  address = "https://vault.example.com:8200"
}

auto_auth {
  method "approle" {
    config = {
      role_id_file_path   = "/etc/openai-agent/role-id"
      secret_id_file_path = "/etc/openai-agent/secret-id"
      # The Agent needs the file again after a restart.
      remove_secret_id_file_after_reading = false
    }
  }
}

template_config {
  # Without this the Agent stops retrying after a few failures and keeps running
  # with an old file. With it the Agent exits, and its supervisor restarts it.
  exit_on_retry_failure = true
}

template {
  destination = "/run/openai/api-key"
  perms       = "0600"
  contents    = "{{ with secret \"openai/creds/my-app\" }}{{ .Data.api_key }}{{ end }}"
}
