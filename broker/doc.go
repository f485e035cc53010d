// Package broker lets a program use OpenAI without holding a key. It leases a
// key from Vault, keeps the key in its memory, and forwards the program's
// requests to OpenAI with that key in place of a placeholder.
//
// The package knows nothing of the secrets engine but its paths: creds/<role>
// and static-creds/<name>.
//
//	config.go   settings of the command line and of broker.json, and their rules
//	vault.go    login, leases and their renewal at Vault
//	keys.go     the current key of an agent: renewal, replacement, revocation
//	policy.go   which requests pass: host, token, path, headers, models, limits
//	proxy.go    one request from the agent to OpenAI and back
//	audit.go    the audit log and the metrics
//	broker.go   listeners, start, the program under "run", shutdown
//	process.go  the process, its child and their signals
package broker
