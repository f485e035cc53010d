# Vault Agent as a supervisor: runs a program with a key in its environment and
# restarts it with a new key before the old one ends.
#
#   vault agent -config=exec.hcl
#
# The key is not written to disk. Renewals do not change the key, so a restart
# happens about once per max_ttl of the role.

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

template_config {
  exit_on_retry_failure = true
}

env_template "OPENAI_API_KEY" {
  contents             = "{{ with secret \"openai/creds/my-app\" }}{{ .Data.api_key }}{{ end }}"
  error_on_missing_key = true
}

exec {
  command                   = ["/usr/local/bin/my-app"]
  restart_on_secret_changes = "always"
  restart_stop_signal       = "SIGTERM"
}
