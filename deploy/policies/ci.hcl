# A CI job: keys of one short-lived role. The token that a job logs in with is
# revoked at its end, and its keys with it; that right is in Vault's `default`
# policy.

path "openai/creds/ci" {
  capabilities = ["read"]
}
