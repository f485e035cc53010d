// Command external-secrets runs the External Secrets Operator's code for a
// VaultDynamicSecret without a cluster: it runs the generator of a manifest once, and
// prints the data for the Secret as JSON.
//
//	VAULT_TOKEN=… external-secrets generator.yaml
//
// It replaces the manifest's Kubernetes login, which requires a cluster, by a token. It is
// a separate module because of the Operator's dependencies. The version is the last whose
// generator the module proxy has.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	stores "github.com/external-secrets/external-secrets/apis/externalsecrets/v1"
	generators "github.com/external-secrets/external-secrets/apis/generators/v1alpha1"
	"github.com/external-secrets/external-secrets/apis/meta/v1"
	vault "github.com/external-secrets/external-secrets/pkg/generator/vault"
	corev1 "k8s.io/api/core/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/yaml"
)

// nowhere is a cluster without a server: the generator requires one, but does not call it
// with a token.
const nowhere = `{apiVersion: v1, kind: Config, current-context: none,
contexts: [{name: none, context: {cluster: none}}],
clusters: [{name: none, cluster: {server: "http://127.0.0.1:1"}}]}`

func main() {
	if err := run(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "external-secrets:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, manifest string) error {
	content, err := os.ReadFile(manifest)
	if err != nil {
		return err
	}
	spec, err := generator(content)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "external-secrets-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	kubeconfig := filepath.Join(dir, "config")
	if err := os.WriteFile(kubeconfig, []byte(nowhere), 0o600); err != nil {
		return err
	}
	if err := os.Setenv("KUBECONFIG", kubeconfig); err != nil {
		return err
	}
	cluster := fake.NewClientBuilder().WithObjects(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "token", Namespace: spec.Namespace},
		Data:       map[string][]byte{"token": []byte(os.Getenv("VAULT_TOKEN"))},
	}).Build()
	spec.Spec.Provider.Auth = &stores.VaultAuth{TokenSecretRef: &v1.SecretKeySelector{Name: "token", Key: "token"}}
	raw, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	made, _, err := (&vault.Generator{}).Generate(ctx, &apiextensions.JSON{Raw: raw}, cluster, spec.Namespace)
	if err != nil {
		return err
	}
	data := map[string]string{}
	for name, value := range made {
		data[name] = string(value)
	}
	return json.NewEncoder(os.Stdout).Encode(data)
}

// generator finds the generator among the objects of a file. Unknown fields are an error.
func generator(content []byte) (*generators.VaultDynamicSecret, error) {
	for _, document := range bytes.Split(content, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(document, &kind); err != nil {
			return nil, err
		}
		if kind.Kind == "VaultDynamicSecret" {
			var found generators.VaultDynamicSecret
			return &found, yaml.UnmarshalStrict(document, &found)
		}
	}
	return nil, errors.New("the file has no VaultDynamicSecret")
}
