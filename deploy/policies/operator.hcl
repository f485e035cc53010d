# An operator: configures and mends the engine, and takes no keys. Whoever may
# write a role decides what its keys can reach, so this policy and those of
# the applications belong to different people.

path "openai/config" {
  capabilities = ["create", "read", "update", "delete"]
}

path "openai/config/rotate" {
  capabilities = ["update"]
}

path "openai/rotate-root" {
  capabilities = ["update"]
}

path "openai/roles" {
  capabilities = ["list"]
}

path "openai/roles/*" {
  capabilities = ["create", "read", "update", "delete", "list"]
}

path "openai/static-roles" {
  capabilities = ["list"]
}

path "openai/static-roles/*" {
  capabilities = ["create", "read", "update", "delete", "list"]
}

path "openai/rotate-role/*" {
  capabilities = ["update"]
}

path "openai/projects" {
  capabilities = ["list"]
}

path "openai/projects/" {
  capabilities = ["list"]
}

path "openai/tidy" {
  capabilities = ["update"]
}

path "openai/tidy-status" {
  capabilities = ["read"]
}

path "openai/tidy-cancel" {
  capabilities = ["update"]
}

path "openai/metrics" {
  capabilities = ["read"]
}

# The leases of this engine, and the end of all of them when a key has leaked.
path "sys/leases/lookup/openai/creds/*" {
  capabilities = ["list", "sudo"]
}

path "sys/leases/lookup" {
  capabilities = ["update"]
}

path "sys/leases/revoke" {
  capabilities = ["update"]
}

path "sys/leases/revoke-prefix/openai/creds/*" {
  capabilities = ["update", "sudo"]
}

# How the mount is audited, see docs/tools/audit.md.
path "sys/mounts/openai/tune" {
  capabilities = ["read", "update"]
}
