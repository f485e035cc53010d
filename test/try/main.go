package main

import (
	"context"
	"fmt"
	"os"

	"github.com/hashicorp/vault/api"
	"vault-plugin-secrets-openai/test/devenv"
)
func main() {
	devenv.IsolateEnv()
	ctx := context.Background()
	v, err := devenv.Start(ctx, devenv.Options{Storage: "inmem", Env: []string{"FOO=bar"}, Config: "telemetry {\n prometheus_retention_time = \"1h\"\n}"})
	if err != nil { fmt.Println(err); return }
	defer func() { fmt.Println(v.Stop()) }()
	dir, _ := os.MkdirTemp("", "x"); defer os.RemoveAll(dir)
	for _, ver := range []string{"", "v0.2.0"} {
		p, err := devenv.BuildPlugin(ctx, dir, devenv.BuildOptions{Version: ver})
		fmt.Println(p, err, v.Register(ctx, p))
	}
	fmt.Println(v.Mount(ctx, "a", api.MountConfigInput{}))
	fmt.Println(v.Client().Sys().ListPlugins(&api.ListPluginsInput{Type: api.PluginTypeSecrets}))
	m, err := v.Client().Sys().GetMount("a")
	fmt.Println(m.RunningVersion, err)
	pids, _ := v.PluginPIDs()
	fmt.Println(pids)
	if len(os.Args) > 1 {
		v.Kill()
		for _, p := range pids { c, e := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p)); fmt.Println("after kill:", string(c), e) }
	}
}
