package openaisecrets

// This file owns the plugin's name and version.

// version is set by the build with -ldflags -X. It must be a semantic version with a
// leading v: Vault rejects a plugin whose version differs from its registration.
var version = "v0.1.0-dev"

// PluginName is the name of the binary and of the plugin in the catalog.
const PluginName = "vault-plugin-secrets-openai"

// Version returns the plugin's version, such as "v0.1.0".
func Version() string { return version }
