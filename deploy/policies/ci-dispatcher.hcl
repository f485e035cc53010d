# What hands keys to jobs that cannot log in themselves: it may read the role,
# but only wrapped, so it never sees a key, and the wrapping must be opened
# within ten minutes.

path "openai/creds/ci" {
  capabilities     = ["read"]
  min_wrapping_ttl = "1s"
  max_wrapping_ttl = "10m"
}
