#!/usr/bin/env bash
# Vault's side of the GitHub Actions job: which jobs may log in. Run it once,
# with a token that may enable auth methods, after writing the policy openai-ci.
set -euo pipefail

vault auth enable -path=github jwt
vault write auth/github/config \
  oidc_discovery_url=https://token.actions.githubusercontent.com \
  bound_issuer=https://token.actions.githubusercontent.com

# The claims keep other repositories out: GitHub signs tokens for every
# repository. The token is a service token so that the job can revoke it; its max
# TTL is the limit for a job that is killed before that.
vault write auth/github/role/openai-ci - <<'JSON'
{
  "role_type": "jwt",
  "user_claim": "sub",
  "bound_audiences": ["https://vault.example.com:8200"],
  "bound_claims": {
    "repository": "my-org/my-repo",
    "ref": "refs/heads/main"
  },
  "token_policies": ["openai-ci"],
  "token_type": "service",
  "token_ttl": "30m",
  "token_explicit_max_ttl": "1h"
}
JSON
