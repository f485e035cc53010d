package openaitest

import (
	"net/http"
	"slices"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
)

// SpecFault is a change to OpenAI's document that makes valid calls violate it.
type SpecFault int

// The changes to a document.
const (
	SpecAsItIs SpecFault = iota
	SpecQuery            // every operation requires a query parameter that no call sends
	SpecBody             // every body requires a field that no call sends
	SpecAnswer           // every answer requires a field that the simulator does not return
)

// ValidateFalsified is Validate with a changed document. It returns the operations that
// the change affects.
func (s *Server) ValidateFalsified(t testing.TB, fault SpecFault) []string {
	t.Helper()
	rules, err := readContract()
	if err != nil {
		t.Fatal(err)
	}
	var changed []string
	stricter := func(content openapi3.Content) bool {
		media := content.Get("application/json")
		if media == nil {
			return false
		}
		media.Schema = openapi3.NewSchemaRef("", &openapi3.Schema{
			AllOf: openapi3.SchemaRefs{media.Schema, openapi3.NewSchemaRef("", openapi3.NewObjectSchema().WithRequired([]string{"impossible"}))},
		})
		return true
	}
	for path, item := range rules.doc.Paths.Map() {
		for method, operation := range item.Operations() {
			concerned := false
			switch fault {
			case SpecAsItIs:
			case SpecQuery:
				operation.AddParameter(openapi3.NewQueryParameter("impossible").WithRequired(true).WithSchema(openapi3.NewStringSchema()))
				concerned = true
			case SpecBody:
				concerned = operation.RequestBody != nil && stricter(operation.RequestBody.Value.Content)
			case SpecAnswer:
				answer := operation.Responses.Status(http.StatusOK)
				concerned = answer != nil && stricter(answer.Value.Content)
			}
			if concerned {
				changed = append(changed, method+" "+path)
			}
		}
	}
	slices.Sort(changed)
	s.validate(t, rules)
	return changed
}
