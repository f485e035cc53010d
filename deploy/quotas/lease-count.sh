#!/usr/bin/env bash
# Vault Enterprise only: at most 200 leases of the engine at a time.
set -euo pipefail

vault write sys/quotas/lease-count/openai path="openai/" max_leases=200
