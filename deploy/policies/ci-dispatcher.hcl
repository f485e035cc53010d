# What hands keys to jobs that cannot log in themselves: it may read the role,
# but only wrapped, so that no key is in its answers or logs by accident, and
# the wrapping must be opened within ten minutes. It can open what it has
# wrapped: trust it like a reader of the role.

path "openai/creds/ci" {
  capabilities     = ["read"]
  min_wrapping_ttl = "1s"
  max_wrapping_ttl = "10m"
}
