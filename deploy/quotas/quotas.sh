#!/usr/bin/env bash
# Limits for the engine at openai/, so that a loop in one program does not use
# up the pace that OpenAI allows to all.
set -euo pipefail

# At most 30 new keys in a minute from each client address, of all roles that
# have no rule of their own. What is over it gets a 429 from Vault before the
# engine is asked. (One limit for all addresses takes Enterprise's group_by=none.) Renewing and revoking are not
# limited by it: they are other paths.
vault write sys/quotas/rate-limit/openai-creds path="openai/creds/*" rate=30 interval=1m

# For one role, and here with a pause: who exceeds it is refused for a minute.
vault write sys/quotas/rate-limit/openai-creds-ci path="openai/creds/ci" rate=5 interval=1m block_interval=1m
