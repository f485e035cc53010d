# A key for the run itself, which is in no state and no plan file. The provider
# opens it in each plan and each apply, which makes a credential each time, and
# neither renews nor revokes it: the ttl in data_json is how long it lives.
#
# To give a running application its key, use an agent or an operator instead.

ephemeral "vault_generic_endpoint" "openai" {
  path         = "openai/creds/my-app"
  data_json    = jsonencode({ ttl = 900 })
  write_fields = ["api_key", "api_key_id", "lease_id"]
}

provider "openai" {
  api_key = ephemeral.vault_generic_endpoint.openai.write_data["api_key"]
}
