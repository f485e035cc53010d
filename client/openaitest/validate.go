// This file owns the contract test's validation of exchanges against OpenAI's published
// document. The document is not part of this project; without it, validation is skipped
// with a message.

package openaitest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
)

// SpecEnv is the environment variable with the path of the Admin API's OpenAPI document.
const SpecEnv = "OPENAI_OPENAPI_SPEC"

// contract checks exchanges against the document.
type contract struct {
	doc *openapi3.T
}

// errNoSpec is returned without a document.
var errNoSpec = errors.New("contract validation skipped: no OpenAPI document; set " + SpecEnv)

// Parsing the document takes most of a second, so a test binary does it once.
var loadContract = sync.OnceValues(readContract)

func readContract() (*contract, error) {
	path := os.Getenv(SpecEnv)
	if path == "" {
		return nil, errNoSpec
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", SpecEnv, err)
	}
	doc, err := openapi3.NewLoader().LoadFromData(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return newContract(doc), nil
}

// newContract adds the only inference operation that the engine uses to the document of
// the Admin API, as in the API reference, unless the document includes it.
func newContract(doc *openapi3.T) *contract {
	if doc.Paths.Value(modelsRoute) == nil {
		model := openapi3.NewObjectSchema().
			WithProperty("id", openapi3.NewStringSchema()).
			WithProperty("object", openapi3.NewStringSchema().WithEnum("model")).
			WithProperty("created", openapi3.NewIntegerSchema()).
			WithProperty("owned_by", openapi3.NewStringSchema()).
			WithRequired([]string{"id", "object", "created", "owned_by"})
		list := openapi3.NewObjectSchema().
			WithProperty("object", openapi3.NewStringSchema().WithEnum("list")).
			WithProperty("data", openapi3.NewArraySchema().WithItems(model)).
			WithRequired([]string{"object", "data"})
		doc.Paths.Set(modelsRoute, &openapi3.PathItem{Get: &openapi3.Operation{
			Responses: openapi3.NewResponses(openapi3.WithStatus(http.StatusOK, &openapi3.ResponseRef{
				Value: openapi3.NewResponse().WithDescription("OK").WithJSONSchema(list),
			})),
		}})
	}
	addUsage(doc)
	return &contract{doc: doc}
}

// addUsage adds the kinds of usage that the document lacks, with the parameters of
// completions, and amounts as strings, which OpenAI sends, too.
func addUsage(doc *openapi3.T) {
	if costs := doc.Components.Schemas["CostsResult"]; costs != nil {
		number := openapi3.NewSchemaRef("", openapi3.NewFloat64Schema())
		text := openapi3.NewSchemaRef("", openapi3.NewStringSchema())
		costs.Value.Properties["amount"].Value.Properties["value"] = openapi3.NewSchemaRef("", &openapi3.Schema{AnyOf: openapi3.SchemaRefs{number, text}})
	}
	completions := doc.Paths.Value(usageRoute + "/completions")
	if completions == nil {
		return
	}
	result := openapi3.NewObjectSchema().WithProperty("object", openapi3.NewStringSchema()).WithRequired([]string{"object"})
	bucket := openapi3.NewObjectSchema().
		WithProperty("object", openapi3.NewStringSchema().WithEnum("bucket")).
		WithProperty("start_time", openapi3.NewIntegerSchema()).
		WithProperty("end_time", openapi3.NewIntegerSchema()).
		WithProperty("results", openapi3.NewArraySchema().WithItems(result)).
		WithRequired([]string{"object", "start_time", "end_time", "results"})
	page := openapi3.NewObjectSchema().
		WithProperty("object", openapi3.NewStringSchema().WithEnum("page")).
		WithProperty("data", openapi3.NewArraySchema().WithItems(bucket)).
		WithProperty("has_more", openapi3.NewBoolSchema()).
		WithRequired([]string{"object", "data", "has_more"})
	for _, kind := range UsageKinds {
		if doc.Paths.Value(usageRoute+"/"+kind) == nil {
			doc.Paths.Set(usageRoute+"/"+kind, &openapi3.PathItem{Get: &openapi3.Operation{
				Parameters: slices.Clone(completions.Get.Parameters),
				Responses: openapi3.NewResponses(openapi3.WithStatus(http.StatusOK, &openapi3.ResponseRef{
					Value: openapi3.NewResponse().WithDescription("OK").WithJSONSchema(page),
				})),
			}})
		}
	}
}

// Validate fails the test for every accepted request and every answer that violates
// OpenAI's document, until the test ends. Rejected requests, answers that a fault changed,
// and inference operations that the document lacks are not validated. Without a document,
// Validate only logs that.
func (s *Server) Validate(t testing.TB) {
	t.Helper()
	rules, err := loadContract()
	if errors.Is(err, errNoSpec) {
		t.Log(err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	s.validate(t, rules)
}

func (s *Server) validate(t testing.TB, rules *contract) {
	// A handler may outlive the test that it serves; t must not be used then.
	var mu sync.Mutex
	over := false
	remove := s.addObserver(func(x exchange) {
		if err := rules.check(x); err != nil {
			mu.Lock()
			defer mu.Unlock()
			if !over {
				t.Errorf("contract: %v", err)
			}
		}
	})
	t.Cleanup(func() {
		remove()
		mu.Lock()
		defer mu.Unlock()
		over = true
	})
}

func (k *contract) check(x exchange) error {
	if x.route == nil {
		return nil
	}
	name := x.route.method + " " + x.route.template
	item := k.doc.Paths.Value(x.route.template)
	if item == nil || item.GetOperation(x.route.method) == nil {
		if !x.route.admin {
			return nil
		}
		return fmt.Errorf("%s is not in the document", name)
	}
	in := &openapi3filter.RequestValidationInput{
		Request:    x.request,
		PathParams: x.vars,
		Route: &routers.Route{
			Spec: k.doc, Path: x.route.template, PathItem: item,
			Method: x.route.method, Operation: item.GetOperation(x.route.method),
		},
		Options: &openapi3filter.Options{
			// The simulator's own tests cover authentication; the document only requires
			// a bearer token.
			AuthenticationFunc: openapi3filter.NoopAuthenticationFunc,
		},
	}
	if x.status < http.StatusBadRequest {
		if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
			return fmt.Errorf("%s: the request was accepted: %w", name, err)
		}
	}
	return k.checkAnswer(name, in, x)
}

// checkAnswer uses the operation's schema for a declared status, and otherwise the
// document's error object.
func (k *contract) checkAnswer(name string, in *openapi3filter.RequestValidationInput, x exchange) error {
	if media := x.header.Get("Content-Type"); !strings.HasPrefix(media, "application/json") {
		return fmt.Errorf("%s: %d with content type %q", name, x.status, media)
	}
	if in.Route.Operation.Responses.Value(strconv.Itoa(x.status)) != nil {
		err := openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
			RequestValidationInput: in,
			Status:                 x.status,
			Header:                 x.header,
			Body:                   io.NopCloser(bytes.NewReader(x.body)),
			Options:                &openapi3filter.Options{IncludeResponseStatus: true},
		})
		if err != nil {
			return fmt.Errorf("%s: answer %d: %w", name, x.status, err)
		}
		return nil
	}
	if x.status < http.StatusBadRequest {
		return fmt.Errorf("%s: the document has no answer %d", name, x.status)
	}
	var body any
	if err := json.Unmarshal(x.body, &body); err != nil {
		return fmt.Errorf("%s: answer %d: %w", name, x.status, err)
	}
	if err := k.doc.Components.Schemas["ErrorResponse"].Value.VisitJSON(body); err != nil {
		return fmt.Errorf("%s: answer %d: %w", name, x.status, err)
	}
	return nil
}
