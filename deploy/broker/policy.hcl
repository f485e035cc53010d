# What a broker's Vault token needs for one role, beside Vault's default policy:
# that one lets it look up, renew and revoke itself, and renew its leases.

path "openai/creds/my-app" {
  capabilities = ["read"]
}

# For an agent with static_role.
path "openai/static-creds/batch" {
  capabilities = ["read"]
}

# Only for a token that the broker did not log in for itself (-auth token,
# token-file or none): without this, the key outlives the agent until its lease
# ends.
path "sys/leases/revoke/openai/creds/my-app/*" {
  capabilities = ["update"]
  # A lease_id in the body would be revoked instead, whatever its mount.
  allowed_parameters = {
    "sync" = []
  }
}
