# A team: writes its own roles within limits that the operator sets here, and
# reads no keys. Names that begin with team-a- belong to the team; no team's
# prefix may be the start of another's.
#
# Every write names all four fields, so that no default applies. Vault compares
# text: max_ttl=480m and 28800 are not "8h". Vault accepts empty text and empty
# lists, which mean every scope, the longest default or the config's project, so
# they are denied one by one. Vault denies fields that are not listed, among them
# key_expiry, credential_type and service_account_id.
#
# The rules of a token's policies add up: another policy that allows writes to
# this path without these limits removes them.
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
