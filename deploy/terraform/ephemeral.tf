# A key for the run, which is in no state and no plan file. The provider reads it
# in each plan and each apply, which creates a service account each time, and
# neither renews nor revokes the lease: it expires after the ttl in data_json.
#
# For the key of a running application, use Vault Agent or an operator instead.

ephemeral "vault_generic_endpoint" "openai" {
  path         = "openai/creds/my-app"
  data_json    = jsonencode({ ttl = 900 })
  write_fields = ["api_key", "api_key_id", "lease_id"]
}

provider "openai" {
  api_key = ephemeral.vault_generic_endpoint.openai.write_data["api_key"]
}
