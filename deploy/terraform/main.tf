# The engine's roles and policies as code, with the hashicorp/vault provider.
#
# Not openai/config: whatever Terraform writes there it keeps in its state, and
# would write again after each change, over an admin key that the engine has
# rotated since. Configure the engine by hand once and rotate (README).

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
  description = "The OpenAI project whose keys the role gives out."
}

# Durations in seconds, as the engine answers with them: "1h" would be a change
# in every plan.
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
