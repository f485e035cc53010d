#!/usr/bin/env bash
# Makes the audit log show names and IDs, which are no secrets, so that its
# entries can be joined with OpenAI's. All other values stay hashed. Never add
# api_key or admin_api_key.
#
# Each option replaces the whole list.
set -euo pipefail

response=(api_key_id service_account service_account_id project_id expires_at
  admin_api_key_id effective_admin_api_key_id last_rotated orphans)
request=(project_id ttl max_ttl service_account_name_template rotation_period
  rotation_schedule apply)

args=()
for key in "${response[@]}"; do args+=("-audit-non-hmac-response-keys=$key"); done
for key in "${request[@]}"; do args+=("-audit-non-hmac-request-keys=$key"); done
vault secrets tune "${args[@]}" openai/
