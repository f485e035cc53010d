# An operator: configures and repairs the engine, and reads no keys. Anyone with
# write access to roles controls what their keys can reach, so give this policy
# and those of the applications to different people. It does not allow tuning the
# mount, which can make the audit log show keys (docs/tools/audit.md).

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

path "openai/projects/*" {
  capabilities = ["read"]
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

# List, look up and revoke the leases of this engine.
path "sys/leases/lookup/openai/creds/*" {
  capabilities = ["list", "sudo"]
}

path "sys/leases/lookup" {
  capabilities = ["update"]
}

# The command `vault lease revoke` puts the lease's ID into the path. An ID in the
# body would override it and can be of any mount, so only `sync` is allowed there.
path "sys/leases/revoke/openai/creds/*" {
  capabilities       = ["update"]
  allowed_parameters = { "sync" = [] }
}

path "sys/leases/revoke-prefix/openai/creds/*" {
  capabilities = ["update", "sudo"]
}
