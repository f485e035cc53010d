# A dispatcher for jobs that cannot log in: it reads the role only wrapped, so
# that no key is in its output by accident, and the job must open the wrapping
# within ten minutes. The dispatcher can open what it wrapped: trust it like a
# reader of the role.

path "openai/creds/ci" {
  capabilities     = ["read"]
  min_wrapping_ttl = "1s"
  max_wrapping_ttl = "10m"
}
