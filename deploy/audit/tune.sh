#!/usr/bin/env bash
# Has the audit log show the names that the engine gives to things, which are no
# secrets and by which an investigation joins the log with OpenAI's own. All
# other values stay hashed, api_key and admin_api_key above all: never list them.
#
# Each option replaces the whole list, so name all of them each time.
set -euo pipefail

response=(api_key_id service_account service_account_id project_id expires_at
  admin_api_key_id effective_admin_api_key_id last_rotated orphans)
request=(project_id ttl max_ttl service_account_name_template rotation_period
  rotation_schedule apply)

args=()
for key in "${response[@]}"; do args+=("-audit-non-hmac-response-keys=$key"); done
for key in "${request[@]}"; do args+=("-audit-non-hmac-request-keys=$key"); done
vault secrets tune "${args[@]}" openai/
