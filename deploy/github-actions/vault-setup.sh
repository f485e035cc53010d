#!/usr/bin/env bash
# Vault's side of the GitHub Actions job: who may log in, and as what. Run once,
# by somebody who may enable auth methods. The policy is deploy/policies/ci.hcl:
#
#   vault policy write openai-ci ci.hcl
set -euo pipefail

vault auth enable -path=github jwt
vault write auth/github/config \
  oidc_discovery_url=https://token.actions.githubusercontent.com \
  bound_issuer=https://token.actions.githubusercontent.com

# The claims are what keeps other repositories out: GitHub signs for everybody.
# A service token, since only such a one can be revoked at the end of the job;
# its longest life is the bound for a job that is killed before that.
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
