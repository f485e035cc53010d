// Package examples checks the examples under deploy/ that no test can run. It
// compares them with their tools' formats: Kubernetes' own types, the operators'
// CRDs, the fields of Vault's paths, GitHub's workflow syntax, Terraform's
// language, and lists of field names for tools that publish nothing better.
//
// It is a separate module, since the plugin does not need its dependencies. The
// integration tests and `go test` in this folder run it. What must stay true:
// each check rejects a misspelled field, and is tested with one.
package examples

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/rhysd/actionlint"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"
	"github.com/zclconf/go-cty/cty/function/stdlib"
	"go.yaml.in/yaml/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

const deploy = "../../deploy"

// The operators, with the CRDs in their modules. Newer versions of the first are
// not on the module proxy.
var operators = map[string]struct{ module, crds string }{
	"vault-secrets-operator": {"github.com/hashicorp/vault-secrets-operator@v0.10.0", "chart/crds/*.yaml"},
	"external-secrets":       {"github.com/external-secrets/external-secrets@v1.3.2", "config/crds/bases/*.yaml"},
}

func TestTheManifestsFitTheOperatorsCRDs(t *testing.T) {
	for folder, operator := range operators {
		schemas := crds(t, operator.module, operator.crds)
		files := glob(t, filepath.Join(deploy, folder, "*.yaml"))
		for _, file := range files {
			if filepath.Base(file) == "deployment.yaml" {
				continue // a type of Kubernetes itself
			}
			for i, object := range documents(t, file) {
				kind := fmt.Sprint(object["apiVersion"], " ", object["kind"])
				schema := schemas[kind]
				if schema == nil {
					t.Errorf("%s: %s has no %s", file, operator.module, kind)
					continue
				}
				if err := schema.VisitJSON(object, openapi3.MultiErrors()); err != nil {
					t.Errorf("%s, object %d: %v", file, i+1, err)
				}
				spec := object["spec"].(map[string]any)
				spec["mispelt"] = true
				if schema.VisitJSON(object) == nil {
					t.Errorf("%s, object %d: a field that does not exist is not noticed", file, i+1)
				}
			}
			t.Logf("%s was held against %s", filepath.Base(file), operator.module)
		}
	}
}

// download returns the folder of a module's sources.
func download(t *testing.T, module string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", module).Output()
	var downloaded struct{ Dir, Error string }
	if jsonErr := json.Unmarshal(out, &downloaded); jsonErr != nil || downloaded.Dir == "" {
		t.Fatalf("fetching %s: %v %s", module, err, downloaded.Error)
	}
	return downloaded.Dir
}

// crds reads the schemas of a module's CRDs: "group/version kind" → schema.
func crds(t *testing.T, module, pattern string) map[string]*openapi3.Schema {
	t.Helper()
	schemas := map[string]*openapi3.Schema{}
	for _, file := range glob(t, filepath.Join(download(t, module), pattern)) {
		for _, crd := range documents(t, file) {
			content, err := json.Marshal(crd)
			must(t, err)
			var definition struct {
				Kind string
				Spec struct {
					Group    string
					Names    struct{ Kind string }
					Versions []struct {
						Name   string
						Schema struct{ OpenAPIV3Schema *openapi3.Schema }
					}
				}
			}
			must(t, json.Unmarshal(content, &definition))
			if definition.Kind != "CustomResourceDefinition" {
				continue // a list of the folder's files
			}
			for _, version := range definition.Spec.Versions {
				schema := version.Schema.OpenAPIV3Schema
				closed(schema)
				schemas[definition.Spec.Group+"/"+version.Name+" "+definition.Spec.Names.Kind] = schema
			}
		}
	}
	return schemas
}

// closed makes a schema reject unknown fields. Kubernetes itself drops them, and
// accepts an object that does not do what it says.
func closed(s *openapi3.Schema) {
	if s == nil {
		return
	}
	if keep, _ := s.Extensions["x-kubernetes-preserve-unknown-fields"].(bool); !keep && len(s.Properties) > 0 && s.AdditionalProperties.Schema == nil {
		no := false
		s.AdditionalProperties.Has = &no
	}
	for _, property := range s.Properties {
		closed(property.Value)
	}
	if s.Items != nil {
		closed(s.Items.Value)
	}
	if s.AdditionalProperties.Schema != nil {
		closed(s.AdditionalProperties.Schema.Value)
	}
}

// The Deployments use objects of the page and the other manifests: the service
// account, the Secret with its key, and the login that Vault's role is bound to.
func TestTheDeploymentsFitKubernetes(t *testing.T) {
	files := glob(t, filepath.Join(deploy, "*", "deployment.yaml"))
	if len(files) != 3 {
		t.Errorf("%d Deployments", len(files))
	}
	for _, file := range files {
		all := documents(t, file)
		if len(all) != 1 {
			t.Fatalf("%s has %d objects", file, len(all))
		}
		deployment, err := asDeployment(all[0])
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		pod := deployment.Spec.Template
		for what, pair := range map[string][2]string{
			"apiVersion":           {deployment.APIVersion, "apps/v1"},
			"kind":                 {deployment.Kind, "Deployment"},
			"namespace":            {deployment.Namespace, "my-app"},
			"name":                 {deployment.Name, "my-app"},
			"service account":      {pod.Spec.ServiceAccountName, "my-app"},
			"label and selector":   {pod.Labels["app"], deployment.Spec.Selector.MatchLabels["app"]},
			"number of containers": {fmt.Sprint(len(pod.Spec.Containers)), "1"},
		} {
			if pair[0] != pair[1] || pair[0] == "" {
				t.Errorf("%s: %s is %q, not %q", file, what, pair[0], pair[1])
			}
		}
		container := pod.Spec.Containers[0]
		switch filepath.Base(filepath.Dir(file)) {
		case "agent-injector":
			checkInjected(t, file, pod)
		case "vault-secrets-operator":
			if from := container.EnvFrom; len(from) != 1 || from[0].SecretRef.Name != "openai" {
				t.Errorf("%s: the environment is not the Operator's Secret: %v", file, from)
			}
		case "external-secrets":
			if v := pod.Spec.Volumes; len(v) != 1 || v[0].Secret.SecretName != "openai" || container.VolumeMounts[0].Name != v[0].Name {
				t.Errorf("%s: the volume is not the Operator's Secret: %v", file, v)
			}
		}
		spec := all[0]["spec"].(map[string]any)
		spec["mispelt"] = true
		if _, err := asDeployment(all[0]); err == nil {
			t.Errorf("%s: a field that does not exist is not noticed", file)
		}
	}
}

func asDeployment(object map[string]any) (d appsv1.Deployment, err error) {
	err = strictly(object, &d)
	return d, err
}

// strictly decodes an object into a Kubernetes type and rejects unknown fields.
func strictly(object map[string]any, into any) error {
	content, err := json.Marshal(object)
	if err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	return decoder.Decode(into)
}

// The broker is a native sidecar: it is ready before the agent starts, and ends
// after it. Only the broker has the login; both have the placeholder.
func TestBrokerPod_MatchesKubernetesTypes(t *testing.T) {
	file := filepath.Join(deploy, "broker", "kubernetes.yaml")
	all := documents(t, file)
	if len(all) != 2 {
		t.Fatalf("%s has %d objects", file, len(all))
	}
	var config corev1.ConfigMap
	var pod corev1.Pod
	must(t, strictly(all[0], &config))
	must(t, strictly(all[1], &pod))
	if len(pod.Spec.InitContainers) != 1 || len(pod.Spec.Containers) != 1 {
		t.Fatalf("%d and %d containers", len(pod.Spec.InitContainers), len(pod.Spec.Containers))
	}
	broker, agent := pod.Spec.InitContainers[0], pod.Spec.Containers[0]
	mounts := func(c corev1.Container) (names []string) {
		for _, m := range c.VolumeMounts {
			names = append(names, m.Name)
		}
		return names
	}
	for what, holds := range map[string]bool{
		"kinds":                     config.Kind == "ConfigMap" && config.APIVersion == "v1" && pod.Kind == "Pod" && pod.APIVersion == "v1",
		"the configuration":         config.Data["broker.json"] != "" && pod.Spec.Volumes[0].ConfigMap.Name == config.Name,
		"a native sidecar":          broker.RestartPolicy != nil && *broker.RestartPolicy == corev1.ContainerRestartPolicyAlways,
		"ready before the agent":    broker.StartupProbe != nil && broker.StartupProbe.Exec != nil && broker.StartupProbe.Exec.Command[1] == "env",
		"time for the drain":        pod.Spec.TerminationGracePeriodSeconds != nil && *pod.Spec.TerminationGracePeriodSeconds >= 20+50 && strings.Contains(config.Data["broker.json"], `"drain": "20s"`),
		"the login is the broker's": pod.Spec.AutomountServiceAccountToken != nil && !*pod.Spec.AutomountServiceAccountToken && slices.Contains(mounts(broker), "vault-login"),
		"and not the agent's":       slices.Equal(mounts(agent), []string{"tokens"}) && agent.VolumeMounts[0].ReadOnly,
		"no shared processes":       pod.Spec.ShareProcessNamespace == nil && !pod.Spec.HostPID,
	} {
		if !holds {
			t.Errorf("%s: %s", file, what)
		}
	}
	all[1]["spec"].(map[string]any)["mispelt"] = true
	if strictly(all[1], &pod) == nil {
		t.Errorf("%s: a field that does not exist is not noticed", file)
	}
}

func checkInjected(t *testing.T, file string, pod corev1.PodTemplateSpec) {
	t.Helper()
	const secret, template = "agent-inject-secret-openai-api-key", "agent-inject-template-openai-api-key"
	var names []string
	for name := range pod.Annotations {
		short, ours := strings.CutPrefix(name, "vault.hashicorp.com/")
		if !ours {
			t.Errorf("%s: %s is not the Injector's", file, name)
		}
		if short != secret && short != template {
			names = append(names, short)
		}
	}
	known(t, file, "injector annotations", names)
	if pod.Annotations["vault.hashicorp.com/"+secret] != "openai/creds/my-app" ||
		!strings.Contains(pod.Annotations["vault.hashicorp.com/"+template], `with secret "openai/creds/my-app"`) {
		t.Errorf("%s: the secret and its template: %v", file, pod.Annotations)
	}
	volumes := pod.Spec.Volumes
	if len(volumes) != 1 || volumes[0].Name != pod.Annotations["vault.hashicorp.com/agent-service-account-token-volume-name"] ||
		volumes[0].Projected.Sources[0].ServiceAccountToken.Audience != "vault" {
		t.Errorf("%s: the login's token: %v", file, volumes)
	}
}

// The server that the tests build has no kubernetes auth method, so this compares
// what the page writes with the fields in the method's source.
func TestTheKubernetesPageNamesTheFieldsOfVault(t *testing.T) {
	content, err := os.ReadFile("../../docs/tools/kubernetes.md")
	must(t, err)
	token := fields(t, "github.com/hashicorp/vault/sdk@v0.23.0", "helper/tokenutil/tokenutil.go")
	const method = "github.com/hashicorp/vault-plugin-auth-kubernetes@v0.23.1"
	paths := map[string][]string{
		"auth/kubernetes/config":      fields(t, method, "path_config.go"),
		"auth/kubernetes/role/my-app": append(fields(t, method, "path_role.go"), token...),
	}
	seen := 0
	for _, write := range regexp.MustCompile(`\$ vault write (auth/\S+)((?:[^\n\\]|\\\n)*)`).FindAllStringSubmatch(string(content), -1) {
		for _, pair := range strings.Fields(strings.ReplaceAll(write[2], "\\\n", " ")) {
			name, value, _ := strings.Cut(pair, "=")
			seen++
			if !slices.Contains(paths[write[1]], name) {
				t.Errorf("%s has no field %q", write[1], name)
			}
			if name == "audience" && value != "vault" {
				t.Errorf("the audience is %q and not the manifests'", value)
			}
		}
	}
	if seen != 11 {
		t.Errorf("%d fields were found on the page", seen)
	}
}

var schemaField = regexp.MustCompile(`(?m)^\s*"([a-z_]+)": (?:\{|&framework\.FieldSchema\{)`)

// fields reads the field names of a Vault path from its source.
func fields(t *testing.T, module, file string) (names []string) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(download(t, module), file))
	must(t, err)
	for _, m := range schemaField.FindAllStringSubmatch(string(content), -1) {
		names = append(names, m[1])
	}
	if len(names) == 0 {
		t.Fatalf("%s %s: no fields were found", module, file)
	}
	return names
}

func TestTheGitLabJobHasGitLabsKeywords(t *testing.T) {
	file := filepath.Join(deploy, "gitlab-ci", "openai.yml")
	all := documents(t, file)
	job, ok := all[0]["openai"].(map[string]any)
	if len(all) != 1 || len(all[0]) != 1 || !ok {
		t.Fatalf("%s is not one job", file)
	}
	known(t, file, "gitlab job", keys(job))
	known(t, file, "gitlab image", keys(job["image"]))
	for _, token := range job["id_tokens"].(map[string]any) {
		if names := keys(token); len(names) != 1 || names[0] != "aud" {
			t.Errorf("%s: an ID token has %v", file, names)
		}
	}
}

func TestTheWorkflowFitsGitHubAndTheAction(t *testing.T) {
	file := filepath.Join(deploy, "github-actions", "openai.yml")
	content, err := os.ReadFile(file)
	must(t, err)
	linter, err := actionlint.NewLinter(io.Discard, &actionlint.LinterOptions{})
	must(t, err)
	findings, err := linter.Lint(file, content, nil)
	must(t, err)
	for _, finding := range findings {
		t.Errorf("%s:%d: %s", file, finding.Line, finding.Message)
	}

	var workflow struct {
		Jobs map[string]struct {
			Steps []struct {
				Uses string
				With map[string]string
			}
		}
	}
	must(t, yaml.Unmarshal(content, &workflow))
	action := workflow.Jobs["openai"].Steps[0]
	if !strings.HasPrefix(action.Uses, "hashicorp/vault-action@") {
		t.Fatalf("the first step uses %q", action.Uses)
	}
	known(t, file, "vault-action", keys(action.With))
	// As the action reads its list: path and field, then a name.
	for _, secret := range strings.Split(action.With["secrets"], ";") {
		source, name, _ := strings.Cut(secret, "|")
		parts := strings.Fields(source)
		if len(parts) != 2 || parts[0] != "openai/creds/ci" || len(strings.Fields(name)) != 1 {
			t.Errorf("%s: the action cannot read %q", file, secret)
		}
	}
}

func TestTheTerraformFilesFitTheProvider(t *testing.T) {
	context := &hcl.EvalContext{
		Functions: map[string]function.Function{"jsonencode": stdlib.JSONEncodeFunc, "file": function.New(&function.Spec{
			Params: []function.Parameter{{Name: "path", Type: cty.String}},
			Type:   function.StaticReturnType(cty.String),
			Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
				content, err := os.ReadFile(args[0].AsString())
				return cty.StringVal(string(content)), err
			},
		})},
		Variables: map[string]cty.Value{
			"var":  cty.ObjectVal(map[string]cty.Value{"project_id": cty.StringVal("proj_abc")}),
			"path": cty.ObjectVal(map[string]cty.Value{"module": cty.StringVal(filepath.Join(deploy, "terraform"))}),
		},
	}
	seen := 0
	for _, path := range glob(t, filepath.Join(deploy, "terraform", "*.tf")) {
		content, err := os.ReadFile(path)
		must(t, err)
		file, diagnostics := hclsyntax.ParseConfig(content, path, hcl.InitialPos)
		if diagnostics.HasErrors() {
			t.Fatal(diagnostics)
		}
		for _, block := range file.Body.(*hclsyntax.Body).Blocks {
			if len(block.Labels) == 0 || !strings.HasPrefix(block.Labels[0], "vault_") {
				continue
			}
			seen++
			known(t, path, block.Type+" "+block.Labels[0], keys(block.Body.Attributes))
			for name, attribute := range block.Body.Attributes {
				value, diagnostics := attribute.Expr.Value(context)
				if diagnostics.HasErrors() {
					t.Errorf("%s: %s: %v", path, name, diagnostics)
				} else if name == "data_json" && !json.Valid([]byte(value.AsString())) {
					t.Errorf("%s: data_json is not JSON: %s", path, value.AsString())
				}
			}
		}
	}
	if seen != 3 {
		t.Errorf("%d blocks of the provider were found", seen)
	}
}

func TestTheCodingAgentsConfigurationIsRead(t *testing.T) {
	file := filepath.Join(deploy, "coding-agents", "codex.toml")
	var config struct {
		Provider  string                    `toml:"model_provider"`
		Providers map[string]map[string]any `toml:"model_providers"`
	}
	_, err := toml.DecodeFile(file, &config)
	must(t, err)
	provider := config.Providers[config.Provider]
	known(t, file, "codex provider", keys(provider))
	known(t, file, "codex auth", keys(provider["auth"].(map[string]any)))
}

// known compares the names in an example with a list of fields.yaml.
func known(t *testing.T, file, list string, names []string) {
	t.Helper()
	content, err := os.ReadFile("testdata/fields.yaml")
	must(t, err)
	var lists map[string]struct{ Required, Optional []string }
	must(t, yaml.Unmarshal(content, &lists))
	fields, ok := lists[list]
	if !ok {
		t.Fatalf("testdata/fields.yaml has no list %q", list)
	}
	for _, name := range names {
		if !slices.Contains(fields.Required, name) && !slices.Contains(fields.Optional, name) {
			t.Errorf("%s: %s has no field %q", file, list, name)
		}
	}
	for _, name := range fields.Required {
		if !slices.Contains(names, name) {
			t.Errorf("%s: %s lacks %q", file, list, name)
		}
	}
}

// documents reads a file of YAML documents and converts them to JSON's types.
func documents(t *testing.T, file string) (all []map[string]any) {
	t.Helper()
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	decoder := yaml.NewDecoder(f)
	for {
		var document map[string]any
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return all
		}
		must(t, err)
		content, err := json.Marshal(document)
		must(t, err)
		document = nil
		must(t, json.Unmarshal(content, &document))
		if document != nil {
			all = append(all, document)
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	must(t, err)
	if len(files) == 0 {
		t.Fatalf("%s: there are none, so nothing is checked", pattern)
	}
	return files
}

func keys(m any) (names []string) {
	for _, key := range reflect.ValueOf(m).MapKeys() {
		names = append(names, key.String())
	}
	return names
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Dependabot updates only the modules in its list.
func TestDependabotCoversEveryModule(t *testing.T) {
	content, err := os.ReadFile("../../.github/dependabot.yml")
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Updates []struct {
			Ecosystem   string `yaml:"package-ecosystem"`
			Directory   string
			Directories []string
		}
	}
	if err := yaml.Unmarshal(content, &config); err != nil {
		t.Fatal(err)
	}
	var covered, modules []string
	for _, update := range config.Updates {
		if update.Ecosystem == "gomod" {
			covered = append(covered, update.Directories...)
			if update.Directory != "" {
				covered = append(covered, update.Directory)
			}
		}
	}
	err = filepath.WalkDir("../..", func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.IsDir() && path != "../.." && !strings.HasPrefix(filepath.Base(path), "..") {
			switch filepath.Base(path) {
			case "bin", "dist", ".git": // not sources of this repository
				return filepath.SkipDir
			}
		}
		if err == nil && entry.Name() == "go.mod" {
			modules = append(modules, filepath.Join("/", strings.TrimPrefix(filepath.Dir(path), "../..")))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(covered)
	slices.Sort(modules)
	if !slices.Equal(covered, modules) {
		t.Errorf("dependabot.yml has %v, the tree %v", covered, modules)
	}
}

// A tag can be moved, so the commit is pinned and the tag is a comment.
func TestActionsArePinnedToACommit(t *testing.T) {
	pinned := regexp.MustCompile(`@[0-9a-f]{40} # v\d+\.\d+\.\d+$`)
	files := append(glob(t, "../../.github/workflows/*.yml"), glob(t, filepath.Join(deploy, "github-actions", "*.yml"))...)
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "- "))
			if action, ok := strings.CutPrefix(line, "uses: "); ok && !strings.HasPrefix(action, "./") && !pinned.MatchString(action) {
				t.Errorf("%s: %s", file, action)
			}
		}
	}
}
