# The engine's roles and policies as code, with the hashicorp/vault provider.
#
# Not openai/config: the state would contain the admin key, and after a rotation
# the next apply would write the deleted one. Configure the engine by hand.

terraform {
  required_version = ">= 1.10"
  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 5.0"
    }
  }
}

provider "vault" {
  address = "https://vault.example.com:8200"
}

variable "project_id" {
  type        = string
  description = "The OpenAI project of the role's keys."
}

# Durations in seconds, as the engine returns them: "1h" would be a change in
# every plan.
resource "vault_generic_endpoint" "role" {
  path                 = "openai/roles/my-app"
  ignore_absent_fields = true

  data_json = jsonencode({
    project_id = var.project_id
    ttl        = 3600
    max_ttl    = 86400
  })
}

resource "vault_policy" "my_app" {
  name   = "openai-my-app"
  policy = file("${path.module}/../policies/application.hcl")
}
