# An application: reads keys of its one role.
#
# Vault's `default` policy, which a token has unless it is created without it,
# allows renewing and looking up the leases.

path "openai/creds/my-app" {
  capabilities = ["read"]
}

# A static role, if the application has one.
path "openai/static-creds/my-app" {
  capabilities = ["read"]
}
