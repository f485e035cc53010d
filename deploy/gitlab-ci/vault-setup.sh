#!/bin/sh
# Vault's side of the GitLab CI job: which jobs may log in. Run it once, with a
# token that may enable auth methods, after writing the policy openai-ci.
set -eu

vault auth enable -path=gitlab jwt
vault write auth/gitlab/config \
  oidc_discovery_url=https://gitlab.com \
  bound_issuer=https://gitlab.com

# The claims keep other projects out: GitLab signs tokens for every project. The
# token is a service token so that the job can revoke it; its max TTL is the
# limit for a job that is killed before that.
vault write auth/gitlab/role/openai-ci - <<'JSON'
{
  "role_type": "jwt",
  "user_claim": "sub",
  "bound_audiences": ["https://vault.example.com:8200"],
  "bound_claims": {
    "project_path": "my-group/my-project",
    "ref_type": "branch",
    "ref": "main"
  },
  "token_policies": ["openai-ci"],
  "token_type": "service",
  "token_ttl": "30m",
  "token_explicit_max_ttl": "1h"
}
JSON
