package openaisecrets

// This file owns the plugin's name and version.

// version is the plugin's own, set by the build with -ldflags -X. It must be a
// semantic version with a leading v: Vault compares it with the one given at
// registration and refuses the plugin when they differ.
var version = "v0.1.0-dev"

// PluginName is the name of the binary and the name to register it under.
const PluginName = "vault-plugin-secrets-openai"

// Version returns the plugin's version, such as "v0.1.0".
func Version() string { return version }
