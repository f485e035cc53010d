# A CI job: reads keys of one role with a short TTL. The job revokes its token at
# the end, and its keys with it; Vault's `default` policy allows that.

path "openai/creds/ci" {
  capabilities = ["read"]
}
