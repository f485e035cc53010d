# Vault Agent as a supervisor: runs a program that takes its key from the
# environment, and starts it anew with a new key before the old one ends.
#
#   vault agent -config=exec.hcl
#
# Nothing is written to disk. A restart comes at most once per max_ttl of the
# role, since renewing a lease does not change the key.

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
