package openaisecrets

// This file owns what Vault's OpenAPI document says of this engine beyond what
// the framework makes of its paths.

import (
	"encoding/json"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// keepReferences makes Vault keep the references in an external plugin's
// document. It decodes what comes over the plugin protocol by the names of Go
// fields, finds no "$ref" and would describe every body as anything at all; "ref"
// it finds. A Vault that reads "$ref" ignores it.
func keepReferences(resp *logical.Response) {
	doc, ok := resp.Data["openapi"].(*framework.OASDocument)
	if !ok {
		return
	}
	encoded, err := json.Marshal(doc)
	if err != nil {
		return // as it was
	}
	var generic map[string]any
	if json.Unmarshal(encoded, &generic) == nil {
		repeatReferences(generic)
		resp.Data["openapi"] = generic
	}
}

// repeatReferences adds "ref" wherever there is a "$ref".
func repeatReferences(node any) {
	switch node := node.(type) {
	case map[string]any:
		if ref, ok := node["$ref"].(string); ok {
			node["ref"] = ref
		}
		for _, child := range node {
			repeatReferences(child)
		}
	case []any:
		for _, child := range node {
			repeatReferences(child)
		}
	}
}
