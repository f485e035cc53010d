# A reader of costs: who spent how much. The reports show display names and names of
# entities, and no keys.

path "openai/usage" {
  capabilities = ["read"]
}
