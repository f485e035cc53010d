# A team: writes its own roles within limits that the operator sets here, and
# takes no keys. Names that begin with team-a- are the team's; no team's prefix
# may be the start of another's.
#
# Every write names all four fields, so that no default applies. Vault compares
# text: max_ttl=480m and 28800 are not "8h". It finds nothing to object to in an
# empty text or list, which would mean every scope, the longest default or the
# config's project, so these are denied one by one. Fields that are not listed
# are refused, among them key_expiry, credential_type and service_account_id.
#
# Vault adds up the rules of a token's policies. Another policy that allows
# writes to this path without these limits lifts them.
path "openai/roles/team-a-*" {
  capabilities = ["create", "read", "update", "delete"]

  required_parameters = ["project_id", "ttl", "max_ttl", "scopes"]

  allowed_parameters = {
    "project_id" = ["proj_abc"]
    "ttl"        = ["15m", "30m", "1h"]
    "max_ttl"    = ["1h", "4h", "8h"]
    "scopes"     = ["api.model.read", "api.model.request"]
  }

  denied_parameters = {
    "project_id" = ["", []]
    "ttl"        = ["", []]
    "max_ttl"    = ["", []]
    "scopes"     = ["", []]
  }
}
