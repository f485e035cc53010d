package openaisecrets

// This file owns what depends on the product of the server, Vault or OpenBao: the name of
// its CLI in hints, and the user agent.
//
// What must stay true: a hint names the CLI that the server comes with; nothing else in
// an answer depends on the product.

import (
	"regexp"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// envOpenBao is set by OpenBao for its plugins.
const envOpenBao = "BAO_VERSION"

// openBaoURL takes the place of Vault's in the user agent.
const openBaoURL = "https://openbao.org/"

// A command of the CLI in a text: quoted, or at a prompt. Every text of the engine says
// it so.
var cliCommand = regexp.MustCompile("([\"`]|\\$ )vault ([a-z])")

// isOpenBao reports whether the server is OpenBao.
func isOpenBao(getenv func(string) string) bool { return getenv(envOpenBao) != "" }

// cli is the name of the server's CLI.
func cli(getenv func(string) string) string {
	if isOpenBao(getenv) {
		return "bao"
	}
	return "vault"
}

// withCLI replaces the CLI in a text of the engine by OpenBao's.
func withCLI(text string) string { return cliCommand.ReplaceAllString(text, "${1}bao ${2}") }

// nameCLI replaces the CLI in the hints of an answer.
func nameCLI(resp *logical.Response) {
	if resp == nil {
		return
	}
	if text, ok := resp.Data["error"].(string); ok && resp.IsError() {
		resp.Data["error"] = withCLI(text)
	}
	for i, warning := range resp.Warnings {
		resp.Warnings[i] = withCLI(warning)
	}
}

// nameCLIInHelp replaces the CLI in all that help and the OpenAPI document say.
func nameCLIInHelp(b *framework.Backend) {
	b.Help = withCLI(b.Help)
	for _, path := range b.Paths {
		path.HelpSynopsis, path.HelpDescription = withCLI(path.HelpSynopsis), withCLI(path.HelpDescription)
		fields := []map[string]*framework.FieldSchema{path.Fields}
		for _, operation := range path.Operations {
			for _, responses := range operation.Properties().Responses {
				for _, response := range responses {
					fields = append(fields, response.Fields)
				}
			}
		}
		for _, schemas := range fields {
			for _, field := range schemas {
				field.Description = withCLI(field.Description)
			}
		}
	}
}

// agentOf is the user agent of the server, which the SDK takes for Vault.
func agentOf(agent string, openBao bool) string {
	if !openBao {
		return agent
	}
	if rest, ok := strings.CutPrefix(agent, "Vault/"); ok {
		agent = "OpenBao/" + rest
	}
	return strings.Replace(agent, "https://www.vaultproject.io/", openBaoURL, 1)
}
