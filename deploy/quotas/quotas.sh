#!/usr/bin/env bash
# Rate limits for the engine at openai/, so that a loop in one program does not
# use up the rate that OpenAI allows to all.
set -euo pipefail

# At most 30 new keys a minute for each client address, for all roles without a
# rule of their own. Vault answers more requests with 429 and does not call the
# engine. Renewals and revocations are not limited. (One limit for all addresses
# needs Enterprise's group_by=none.)
vault write sys/quotas/rate-limit/openai-creds path="openai/creds/*" rate=30 interval=1m

# For one role, with a pause: a client above the limit is blocked for a minute.
vault write sys/quotas/rate-limit/openai-creds-ci path="openai/creds/ci" rate=5 interval=1m block_interval=1m
