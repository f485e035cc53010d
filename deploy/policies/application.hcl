# An application: keys of its one role, and nothing else of the engine.
#
# Vault's `default` policy, which tokens have unless made without it, adds what
# every holder of a lease needs: to renew it and to look it up.

path "openai/creds/my-app" {
  capabilities = ["read"]
}

# A role with a fixed identity, if the application has one.
path "openai/static-creds/my-app" {
  capabilities = ["read"]
}
