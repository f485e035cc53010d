package openaisecrets

// docs/messages.md lists the engine's errors, warnings and log lines that need a hint. A
// message is a text that reaches an error, an error response, a warning, or the logger at
// level warn or error. A small data-flow analysis of the typed code follows each text
// back through variables, fields, parameters and results to its source.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"
)

// A messageKind is the destination of a text.
type messageKind string

const (
	messageError   messageKind = "error"
	messageWarning messageKind = "warning"
	messageLog     messageKind = "log"
	messagePart    messageKind = "part" // of another message
)

// A message is a text of the engine, with … for each value in it.
type message struct {
	kind     messageKind
	text     string
	function string // or variable that contains the text
	hint     string // what to do, if the text does not explain it
	at       token.Position
}

// A flow is an expression, or one result of a call, whose value is assigned or returned.
type flow struct {
	from   ast.Expr
	result int
}

// resultOf is a result of a function or of a function literal.
type resultOf struct {
	function any // types.Object or *ast.FuncLit
	index    int
}

// A module is a set of packages that were type-checked from source, with their flows.
type module struct {
	fset     *token.FileSet
	packages []*types.Package
	files    []*ast.File
	info     *types.Info

	into      map[types.Object][]flow // variables, fields, parameters
	returns   map[resultOf][]flow
	named     map[resultOf]types.Object
	parameter map[types.Object]resultOf // parameter -> its function and position
	calls     map[any][]*ast.CallExpr   // by function
	literals  map[types.Object][]*ast.FuncLit
}

// loadModule type-checks the package in the working directory and those of its
// module that it uses.
func loadModule(t *testing.T) *module {
	t.Helper()
	command := exec.CommandContext(t.Context(), "go", "list", "-export", "-deps", "-json=Dir,ImportPath,Export,GoFiles,Module", ".")
	var complaint bytes.Buffer
	command.Stderr = &complaint
	out, err := command.Output()
	require.NoError(t, err, complaint.String())
	m := &module{
		fset: token.NewFileSet(),
		info: &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}, Selections: map[*ast.SelectorExpr]*types.Selection{}},
		into: map[types.Object][]flow{}, returns: map[resultOf][]flow{}, named: map[resultOf]types.Object{},
		parameter: map[types.Object]resultOf{}, calls: map[any][]*ast.CallExpr{}, literals: map[types.Object][]*ast.FuncLit{},
	}
	exports := map[string]string{}
	compiled := importer.ForCompiler(m.fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	own := map[string]*types.Package{}
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; { // dependencies come first
		var listed struct {
			Dir, ImportPath, Export string
			GoFiles                 []string
			Module                  *struct{ Main bool }
		}
		if err := decoder.Decode(&listed); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		exports[listed.ImportPath] = listed.Export
		if listed.Module == nil || !listed.Module.Main {
			continue
		}
		var files []*ast.File
		for _, name := range listed.GoFiles {
			file, err := parser.ParseFile(m.fset, filepath.Join(listed.Dir, name), nil, parser.SkipObjectResolution)
			require.NoError(t, err)
			files = append(files, file)
		}
		config := types.Config{Importer: importerFunc(func(path string) (*types.Package, error) {
			if p := own[path]; p != nil {
				return p, nil
			}
			return compiled.Import(path)
		})}
		p, err := config.Check(listed.ImportPath, m.fset, files, m.info)
		require.NoError(t, err)
		own[listed.ImportPath] = p
		m.packages = append(m.packages, p)
		m.files = append(m.files, files...)
	}
	for _, file := range m.files {
		m.index(file)
	}
	return m
}

type importerFunc func(path string) (*types.Package, error)

func (f importerFunc) Import(path string) (*types.Package, error) { return f(path) }

// index records the flows in a file.
func (m *module) index(file *ast.File) {
	var enclosing []any // functions, innermost last
	var visit func(n ast.Node) bool
	walk := func(function any, t *ast.FuncType, body *ast.BlockStmt) {
		if body == nil {
			return
		}
		m.signature(function, t)
		enclosing = append(enclosing, function)
		ast.Inspect(body, visit)
		enclosing = enclosing[:len(enclosing)-1]
	}
	visit = func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			walk(m.info.Defs[n.Name], n.Type, n.Body)
			return false
		case *ast.FuncLit:
			walk(n, n.Type, n.Body)
			return false
		case *ast.ReturnStmt:
			if len(enclosing) == 0 {
				return true
			}
			function := enclosing[len(enclosing)-1]
			m.spread(n.Results, func(i int, f flow) {
				key := resultOf{function, i}
				m.returns[key] = append(m.returns[key], f)
			})
		case *ast.AssignStmt:
			m.assign(n.Lhs, n.Rhs)
		case *ast.ValueSpec:
			names := make([]ast.Expr, len(n.Names))
			for i, name := range n.Names {
				names[i] = name
			}
			m.assign(names, n.Values)
		case *ast.RangeStmt: // an element counts as its whole container, here and below
			for _, v := range []ast.Expr{n.Key, n.Value} {
				if v != nil {
					m.set(v, flow{from: n.X})
				}
			}
		case *ast.CompositeLit:
			m.literal(n)
		case *ast.CallExpr:
			if function := m.callee(n); function != nil {
				m.calls[function] = append(m.calls[function], n)
			}
		}
		return true
	}
	ast.Inspect(file, visit)
}

// signature records a function's parameters and named results.
func (m *module) signature(function any, t *ast.FuncType) {
	i := 0
	for _, field := range t.Params.List {
		for _, name := range field.Names {
			if o := m.info.Defs[name]; o != nil {
				m.parameter[o] = resultOf{function, i}
			}
			i++
		}
		if len(field.Names) == 0 {
			i++
		}
	}
	if t.Results == nil {
		return
	}
	i = 0
	for _, field := range t.Results.List {
		for _, name := range field.Names {
			if o := m.info.Defs[name]; o != nil {
				m.named[resultOf{function, i}] = o
			}
			i++
		}
	}
}

// spread calls give for each value: one call may return several.
func (m *module) spread(values []ast.Expr, give func(i int, f flow)) {
	if len(values) == 1 {
		if tuple, ok := m.info.TypeOf(values[0]).(*types.Tuple); ok {
			for i := range tuple.Len() {
				give(i, flow{values[0], i})
			}
			return
		}
	}
	for i, value := range values {
		give(i, flow{from: value})
	}
}

func (m *module) assign(places, values []ast.Expr) {
	m.spread(values, func(i int, f flow) {
		if i < len(places) {
			m.set(places[i], f)
		}
	})
}

// set records a flow into a variable or a field, or into an element of one.
func (m *module) set(place ast.Expr, f flow) {
	switch place := place.(type) {
	case *ast.Ident:
		o := m.info.Defs[place]
		if o == nil {
			o = m.info.Uses[place]
		}
		m.flowInto(o, f)
	case *ast.SelectorExpr:
		m.flowInto(m.info.Uses[place.Sel], f)
	case *ast.IndexExpr:
		m.set(place.X, f)
	case *ast.StarExpr:
		m.set(place.X, f)
	case *ast.ParenExpr:
		m.set(place.X, f)
	}
}

func (m *module) flowInto(o types.Object, f flow) {
	if o == nil {
		return
	}
	m.into[o] = append(m.into[o], f)
	if literal, ok := f.from.(*ast.FuncLit); ok {
		m.literals[o] = append(m.literals[o], literal)
	}
}

// literal records the flows into the fields of a struct.
func (m *module) literal(n *ast.CompositeLit) {
	t := m.info.TypeOf(n)
	if p, ok := t.Underlying().(*types.Pointer); ok {
		t = p.Elem()
	}
	s, ok := t.Underlying().(*types.Struct)
	if !ok {
		return
	}
	for i, element := range n.Elts {
		if pair, ok := element.(*ast.KeyValueExpr); ok {
			m.flowInto(m.info.Uses[pair.Key.(*ast.Ident)], flow{from: pair.Value})
		} else {
			m.flowInto(s.Field(i), flow{from: element})
		}
	}
}

// callee is the called function: an object, a literal, or nil.
func (m *module) callee(call *ast.CallExpr) any {
	switch f := ast.Unparen(call.Fun).(type) {
	case *ast.Ident:
		return m.info.Uses[f]
	case *ast.SelectorExpr:
		return m.info.Uses[f.Sel]
	case *ast.FuncLit:
		return f
	case *ast.IndexExpr: // of type parameters
		if id, ok := f.X.(*ast.Ident); ok {
			return m.info.Uses[id]
		}
	}
	return nil
}

// messages returns the messages of the packages.
func (m *module) messages() []message {
	s := &search{module: m, seen: map[searched]bool{}, found: map[string]map[messageKind]ast.Expr{}}
	for _, file := range m.files {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				s.call(n)
			case *ast.FuncDecl: // func (e *Error) Error() string
				o, ok := m.info.Defs[n.Name].(*types.Func)
				if ok && n.Recv != nil && n.Name.Name == "Error" && isError(o.Signature().Recv().Type()) {
					s.results(o, 0, messageError)
					s.written(n.Body)
				}
			}
			return true
		})
	}
	for o, flows := range m.into {
		if v, ok := o.(*types.Var); ok && v.IsField() && v.Name() == "Warnings" && v.Pkg().Path() == vaultLogical {
			for _, f := range flows {
				s.follow(f, messageWarning)
			}
		}
	}
	return s.all()
}

// all returns the messages in the order of the code. A part that is also a complete
// message is listed only once.
func (s *search) all() (all []message) {
	for text, kinds := range s.found {
		for kind, at := range kinds {
			least := 2
			if kind == messagePart {
				least = 5
			}
			if fixedWords(text) < least || (kind == messagePart && len(kinds) > 1) {
				continue
			}
			all = append(all, message{kind: kind, text: text, function: s.enclosing(at.Pos()), at: s.fset.Position(at.Pos())})
		}
	}
	slices.SortFunc(all, func(a, b message) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.at.Filename, b.at.Filename), cmp.Compare(a.at.Offset, b.at.Offset), cmp.Compare(a.text, b.text))
	})
	return all
}

// enclosing names the function, variable or constant at a position.
func (s *search) enclosing(at token.Pos) string {
	for _, file := range s.files {
		if at < file.FileStart || at > file.FileEnd {
			continue
		}
		for _, declaration := range file.Decls {
			if declaration.Pos() > at || at >= declaration.End() {
				continue
			}
			switch d := declaration.(type) {
			case *ast.FuncDecl:
				return file.Name.Name + "." + d.Name.Name
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if v, ok := spec.(*ast.ValueSpec); ok && v.Pos() <= at && at < v.End() {
						return file.Name.Name + "." + v.Names[0].Name
					}
				}
			}
		}
	}
	return ""
}

const (
	vaultLogical = "github.com/hashicorp/vault/sdk/logical"
	hclogPackage = "github.com/hashicorp/go-hclog"
)

func isError(t types.Type) bool {
	e := types.Universe.Lookup("error").Type().Underlying().(*types.Interface)
	return types.Implements(t, e) || types.Implements(types.NewPointer(t), e)
}

func isText(t types.Type) bool {
	switch u := t.Underlying().(type) {
	case *types.Basic:
		return u.Info()&types.IsString != 0
	case *types.Slice:
		return isText(u.Elem())
	case *types.Array:
		return isText(u.Elem())
	case *types.Map:
		return isText(u.Elem())
	}
	return false
}

// search follows texts back to their source.
type search struct {
	*module
	seen  map[searched]bool
	found map[string]map[messageKind]ast.Expr // the first place, by text and kind
}

type searched struct {
	from   ast.Expr
	result int
	kind   messageKind
}

// call follows the texts that a call turns into messages.
func (s *search) call(n *ast.CallExpr) {
	if tv := s.info.Types[n.Fun]; tv.IsType() { // a text becomes an error
		if isError(tv.Type) && len(n.Args) == 1 && isText(s.info.TypeOf(n.Args[0])) {
			s.follow(flow{from: n.Args[0]}, messageError)
		}
		return
	}
	f, ok := s.callee(n).(*types.Func)
	if !ok || f.Pkg() == nil || s.own(f) {
		return
	}
	signature := f.Signature()
	kind := messageKind("")
	switch receiver := signature.Recv(); {
	case receiver == nil && signature.Results().Len() == 1 && (isError(signature.Results().At(0).Type()) || isResponse(signature.Results().At(0).Type())):
		kind = messageError
	case receiver == nil:
	case f.Pkg().Path() == vaultLogical && f.Name() == "AddWarning":
		kind = messageWarning
	case f.Pkg().Path() == hclogPackage && (f.Name() == "Warn" || f.Name() == "Error"):
		kind = messageLog
	}
	if kind == "" {
		return
	}
	first := true
	for i, arg := range n.Args {
		if !isText(s.info.TypeOf(arg)) {
			continue
		}
		switch {
		case first && signature.Variadic() && i == signature.Params().Len()-2: // a format
			s.format(arg, n.Args[i+1:], kind)
		case first:
			s.follow(flow{from: arg}, kind)
		case !signature.Variadic():
			s.follow(flow{from: arg}, messagePart)
		}
		first = false
	}
}

// written follows the pieces that an Error method writes.
func (s *search) written(body *ast.BlockStmt) {
	ast.Inspect(body, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch f, _ := s.callee(call).(*types.Func); {
		case f == nil:
		case f.FullName() == "fmt.Fprintf":
			s.format(call.Args[1], call.Args[2:], messageError)
		case f.FullName() == "(*strings.Builder).WriteString":
			s.follow(flow{from: call.Args[0]}, messagePart)
		}
		return true
	})
}

func isResponse(t types.Type) bool {
	p, ok := t.(*types.Pointer)
	if !ok {
		return false
	}
	named, ok := p.Elem().(*types.Named)
	return ok && named.Obj().Name() == "Response" && named.Obj().Pkg().Path() == vaultLogical
}

func (s *search) own(o types.Object) bool {
	for _, p := range s.packages {
		if o.Pkg() == p {
			return true
		}
	}
	return false
}

// format follows a format and its arguments: they are parts of the message, or the
// message itself if the format is only a label before it.
func (s *search) format(format ast.Expr, args []ast.Expr, kind messageKind) {
	s.follow(flow{from: format}, kind)
	if text, ok := s.constant(format); !ok || !strings.HasSuffix(filled(text), "…") || fixedWords(filled(text)) > 3 {
		kind = messagePart
	}
	for _, arg := range args {
		s.follow(flow{from: arg}, kind)
	}
}

// follow finds the texts that an expression can have.
func (s *search) follow(f flow, kind messageKind) {
	key := searched{f.from, f.result, kind}
	if s.seen[key] {
		return
	}
	s.seen[key] = true
	if text, ok := s.constant(f.from); ok {
		s.say(text, f.from, kind)
		return
	}
	switch e := f.from.(type) {
	case *ast.ParenExpr:
		s.follow(flow{from: e.X}, kind)
	case *ast.UnaryExpr:
		s.follow(flow{from: e.X}, kind)
	case *ast.StarExpr:
		s.follow(flow{from: e.X}, kind)
	case *ast.IndexExpr:
		s.follow(flow{from: e.X}, kind)
	case *ast.SliceExpr:
		s.follow(flow{from: e.X}, kind)
	case *ast.BinaryExpr:
		if isText(s.info.TypeOf(e)) {
			s.say(s.join(e), e, kind)
			s.parts(e)
		}
	case *ast.CompositeLit:
		if _, isStruct := s.info.TypeOf(e).Underlying().(*types.Struct); isStruct {
			return
		}
		for _, element := range e.Elts {
			if pair, ok := element.(*ast.KeyValueExpr); ok {
				element = pair.Value
			}
			s.follow(flow{from: element}, kind)
		}
	case *ast.Ident:
		s.object(s.info.Uses[e], kind)
	case *ast.SelectorExpr:
		s.object(s.info.Uses[e.Sel], kind)
	case *ast.CallExpr:
		s.called(e, f.result, kind)
	}
}

// object follows the flows into a variable, a field or a parameter.
func (s *search) object(o types.Object, kind messageKind) {
	v, ok := o.(*types.Var)
	if !ok || !isText(v.Type()) {
		return
	}
	for _, f := range s.into[o] {
		s.follow(f, kind)
	}
	at, ok := s.parameter[o]
	if !ok {
		return
	}
	variadic := false
	calls := s.calls[at.function]
	switch function := at.function.(type) {
	case *types.Func:
		variadic = function.Signature().Variadic() && at.index == function.Signature().Params().Len()-1
	case *ast.FuncLit:
		for holder, literals := range s.literals {
			for _, literal := range literals {
				if literal == function {
					calls = append(calls, s.calls[holder]...)
				}
			}
		}
	}
	for _, call := range calls {
		for i, arg := range call.Args {
			if i == at.index || (variadic && i > at.index) {
				s.follow(flow{from: arg}, kind)
			}
		}
	}
}

// called follows the results of a call.
func (s *search) called(call *ast.CallExpr, result int, kind messageKind) {
	if s.info.Types[call.Fun].IsType() {
		s.follow(flow{from: call.Args[0]}, kind)
		return
	}
	switch function := s.callee(call).(type) {
	case *types.Builtin: // append, max
		for _, arg := range call.Args {
			s.follow(flow{from: arg}, kind)
		}
	case *types.Func:
		switch {
		case s.own(function):
			s.results(function, result, kind)
		case function.FullName() == "fmt.Sprintf":
			s.format(call.Args[0], call.Args[1:], kind)
		case function.Pkg() != nil && (function.Pkg().Path() == "strings" || function.Pkg().Path() == "slices" || function.Pkg().Path() == "cmp"):
			for _, arg := range call.Args {
				if isText(s.info.TypeOf(arg)) {
					s.follow(flow{from: arg}, kind)
				}
			}
		}
	case *types.Var: // with a function
		for _, literal := range s.literals[function] {
			s.results(literal, result, kind)
		}
	case *ast.FuncLit:
		s.results(function, result, kind)
	}
}

// results follows what a function returns.
func (s *search) results(function any, index int, kind messageKind) {
	key := resultOf{function, index}
	for _, f := range s.returns[key] {
		if t := s.info.TypeOf(f.from); t != nil {
			s.follow(f, kind)
		}
	}
	if o := s.named[key]; o != nil {
		s.object(o, kind)
	}
	f, ok := function.(*types.Func)
	if !ok || f.Signature().Recv() == nil {
		return
	}
	if of, ok := f.Signature().Recv().Type().Underlying().(*types.Interface); ok {
		for _, p := range s.packages {
			for _, name := range p.Scope().Names() {
				t, ok := p.Scope().Lookup(name).(*types.TypeName)
				if !ok || types.IsInterface(t.Type()) || !types.Implements(types.NewPointer(t.Type()), of) {
					continue
				}
				method, _, _ := types.LookupFieldOrMethod(types.NewPointer(t.Type()), true, p, f.Name())
				if method != nil && method != f {
					s.results(method, index, kind)
				}
			}
		}
	}
}

// parts follows the operands of a sum that are not constants.
func (s *search) parts(e ast.Expr) {
	if sum, ok := ast.Unparen(e).(*ast.BinaryExpr); ok {
		s.parts(sum.X)
		s.parts(sum.Y)
	} else if _, ok := s.constant(e); !ok {
		s.follow(flow{from: e}, messagePart)
	}
}

// join is a sum with … for the operands that are not constants.
func (s *search) join(e ast.Expr) string {
	if text, ok := s.constant(e); ok {
		return text
	}
	switch e := ast.Unparen(e).(type) {
	case *ast.BinaryExpr:
		return s.join(e.X) + s.join(e.Y)
	case *ast.CallExpr:
		if f, ok := s.callee(e).(*types.Func); ok && f.FullName() == "fmt.Sprintf" {
			return s.join(e.Args[0])
		}
	}
	return "…"
}

func (s *search) constant(e ast.Expr) (string, bool) {
	if v := s.info.Types[e].Value; v != nil && v.Kind() == constant.String {
		return constant.StringVal(v), true
	}
	return "", false
}

var verb = regexp.MustCompile(`%(\[\d+\])?[-+# 0]*(\d+)?(\.\d+)?[vTtbcdoOqxXUeEfFgGspw]`)

// filled replaces the verbs of a format with ….
func filled(format string) string {
	return verb.ReplaceAllString(strings.ReplaceAll(format, "%%", "%"), "…")
}

// fixedWords counts the words of a message without ….
func fixedWords(text string) (count int) {
	for word := range strings.FieldsSeq(text) {
		if !strings.Contains(word, "…") && strings.ContainsFunc(word, unicode.IsLetter) {
			count++
		}
	}
	return count
}

func (s *search) say(text string, at ast.Expr, kind messageKind) {
	text = strings.Trim(strings.Join(strings.Fields(filled(text)), " "), " :;,(")
	if s.found[text] == nil {
		s.found[text] = map[messageKind]ast.Expr{}
	}
	before := s.found[text][kind]
	if before == nil || s.fset.Position(at.Pos()).String() < s.fset.Position(before.Pos()).String() {
		s.found[text][kind] = at
	}
}

// --- The page ---

// TestMessages_ThePageListsThemAll compares docs/messages.md and testdata/messages.tsv
// with the code. With UPDATE_DOCS=1 it writes both: a hint stays with its message if that
// is reworded or moved. If the message no longer exists, the test fails and shows the
// dropped hint.
func TestMessages_ThePageListsThemAll(t *testing.T) {
	t.Parallel()
	const page, list, command = "docs/messages.md", "testdata/messages.tsv", "UPDATE_DOCS=1 go test -run TestMessages_ThePageListsThemAll ."
	all := loadModule(t).messages()
	require.Greater(t, len(all), 200, "the messages were not found")
	before, err := os.ReadFile(list)
	require.NoError(t, err)
	dropped := keepHints(all, readMessages(t, string(before)))
	if os.Getenv("UPDATE_DOCS") != "" {
		require.NoError(t, os.WriteFile(list, []byte(writeMessages(all)), 0o644))
		require.NoError(t, os.WriteFile(page, []byte(messagesPage(all)), 0o644))
		for _, m := range dropped {
			t.Errorf("no message replaces %q, so its hint is dropped: %s", m.text, m.hint)
		}
		return
	}
	requireSameLines(t, list, command, writeMessages(all), string(before))
	content, err := os.ReadFile(page)
	require.NoError(t, err)
	requireSameLines(t, page, command, messagesPage(all), string(content))
}

// The troubleshooting page quotes messages of the engine.
func TestTroubleshooting_QuotesWhatTheEngineSays(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("docs/troubleshooting.md")
	require.NoError(t, err)
	page := inlineCode.ReplaceAllString(fence.ReplaceAllString(string(content), ""), "")
	all, err := os.ReadFile("testdata/messages.tsv") // another test compares it with the code
	require.NoError(t, err)
	said := readMessages(t, string(all))
	quotes := regexp.MustCompile(`"([^"\n]+)"`).FindAllStringSubmatch(page, -1)
	require.Greater(t, len(quotes), 10)
	for _, quote := range quotes {
		text := strings.Trim(quote[1], " …")
		if !slices.ContainsFunc(said, func(m message) bool { return strings.Contains(m.text, text) }) {
			t.Errorf("docs/troubleshooting.md: no message says %q", text)
		}
	}
}

// readMessages reads a list of messages: kind, function, text and hint.
func readMessages(t *testing.T, list string) (all []message) {
	t.Helper()
	for line := range strings.Lines(list) {
		columns := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if strings.HasPrefix(line, "#") {
			continue
		}
		require.Len(t, columns, 4, line)
		all = append(all, message{kind: messageKind(columns[0]), function: columns[1], text: columns[2], hint: columns[3]})
	}
	return all
}

func writeMessages(all []message) string {
	var out strings.Builder
	out.WriteString("# Every message of the engine: kind, function, text, and what to do where the text does not say it. Edit the last column only.\n")
	for _, m := range all {
		fmt.Fprintf(&out, "%s\t%s\t%s\t%s\n", m.kind, m.function, m.text, m.hint)
	}
	return out.String()
}

// keepHints copies the earlier hints to the messages, and returns those whose message no
// longer exists.
func keepHints(all, before []message) (dropped []message) {
	type key struct {
		kind messageKind
		text string
	}
	hints, known := map[key]string{}, map[key]bool{}
	for _, m := range before {
		known[key{m.kind, m.text}] = true
		hints[key{m.kind, m.text}] = m.hint
	}
	var fresh []*message // not in the earlier list
	there := map[key]bool{}
	for i := range all {
		m := &all[i]
		m.hint = hints[key{m.kind, m.text}]
		there[key{m.kind, m.text}] = true
		if !known[key{m.kind, m.text}] {
			fresh = append(fresh, m)
		}
	}
	// A reworded message is in the same function or has most of the same words.
	for _, old := range before {
		if there[key{old.kind, old.text}] || old.hint == "" {
			continue
		}
		best, most := -1, 0.5
		for i, m := range fresh {
			likeness := likeness(old.text, m.text)
			if m.function == old.function {
				likeness += 0.5
			}
			if m.kind == old.kind && likeness > most {
				best, most = i, likeness
			}
		}
		if best < 0 {
			dropped = append(dropped, old)
			continue
		}
		fresh[best].hint = old.hint
		fresh = slices.Delete(fresh, best, best+1)
	}
	return dropped
}

// likeness is the share of two texts' words that both have, from 0 to 1.
func likeness(a, b string) float64 {
	of := func(text string) map[string]bool {
		words := map[string]bool{}
		for word := range strings.FieldsSeq(text) {
			words[strings.ToLower(strings.Trim(word, "….,:;()`\""))] = true
		}
		return words
	}
	both, either := 0, of(a)
	for word := range of(b) {
		if either[word] {
			both++
		}
		either[word] = true
	}
	return float64(both) / float64(len(either))
}

const messagesPreamble = `# Messages

<!-- Generated by UPDATE_DOCS=1 go test -run TestMessages_ThePageListsThemAll . from the code and the hints in testdata/messages.tsv. -->

The errors, warnings and log lines that need an explanation; any other message names its cause. Search for the first words of yours; "…" stands for the rest. One message can contain another: search for each part. [Troubleshooting](troubleshooting.md) starts from symptoms.
`

var messageSections = []struct {
	kind    messageKind
	heading string
}{
	{messageError, "Errors"},
	{messageWarning, "Warnings"},
	{messageLog, "Log messages"},
}

// messageFamilies are similar errors without a hint. Each error matches one of the forms,
// which the page shows in one entry.
var messageFamilies = []struct {
	forms   []string
	meaning string
}{
	{[]string{"create …", "read …", "list …", "update …", "delete …", "reading …", "listing …", "decoding …", "deleting …", "writing …", "waiting for …", "failed to …"}, "The engine was doing this. The cause follows."},
	{[]string{"… not stored …", "… not rotated …", "… not renewed …", "… not deleted …", "… not listed", "not sent …"}, "Nothing changed. The reason follows."},
	{[]string{"… not found …", "… no longer exists …"}, "The message says how to list what exists."},
	{[]string{"… must …", "… cannot …", "… requires …", "… is required …", "… missing …", "… contains …", "… exceeds …", "… limit is …", "… is not a valid …", "printf …", "unknown field …"}, "A value is not allowed. The message names the field and its limits."},
}

// hasForm reports whether a text matches a form, in which "…" is any text.
func hasForm(form, text string) bool {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSuffix(form, " …")), "…", ".*")
	return regexp.MustCompile("^" + pattern + `(\W|$)`).MatchString(text)
}

// messagesPage lists the messages by kind: those with a hint, then the families of
// errors. It omits the others, which name their cause.
func messagesPage(all []message) string {
	var out strings.Builder
	out.WriteString(messagesPreamble)
	for _, section := range messageSections {
		fmt.Fprintf(&out, "\n## %s\n\n", section.heading)
		hinted, families := map[string][]string{}, map[string]bool{}
		for _, m := range all {
			switch {
			case m.kind != section.kind:
			case m.hint != "":
				hinted[m.hint] = append(hinted[m.hint], inCode(distinct(m, all)))
			case m.kind == messageError:
				if entry := messageFamily(m.text); entry != "" {
					families[entry] = true
				}
			}
		}
		var lines []string
		for hint, texts := range hinted {
			lines = append(lines, fmt.Sprintf("- %s: %s\n", strings.Join(sortedSet(texts), ", "), hint))
		}
		out.WriteString(strings.Join(sortedSet(lines), ""))
		if len(families) == 0 {
			continue
		}
		out.WriteString("\nThese messages name their cause:\n\n")
		for _, entry := range slices.Sorted(maps.Keys(families)) {
			fmt.Fprintf(&out, "- %s\n", entry)
		}
	}
	return out.String()
}

// messageFamily is the page's entry for a text's family, "" without one.
func messageFamily(text string) string {
	for _, family := range messageFamilies {
		if slices.ContainsFunc(family.forms, func(form string) bool { return hasForm(form, text) }) {
			return "`" + strings.Join(family.forms, "`, `") + "`: " + family.meaning
		}
	}
	return ""
}

// distinct shortens a message with a hint to four words, or more if another hint has a
// message with the same start.
func distinct(m message, all []message) string {
	for count := 4; ; count++ {
		cut := firstWords(m.text, count)
		if cut == m.text || !slices.ContainsFunc(all, func(other message) bool {
			return other.kind == m.kind && other.hint != m.hint && firstWords(other.text, count) == cut
		}) {
			return cut
		}
	}
}

// inCode formats a text as code in Markdown, even if it contains backticks.
func inCode(text string) string {
	if strings.Contains(text, "`") {
		return "`` " + text + " ``"
	}
	return "`" + text + "`"
}

func sortedSet(texts []string) []string {
	slices.Sort(texts)
	return slices.Compact(texts)
}

// firstWords cuts a text after count words.
func firstWords(text string, count int) string {
	words := strings.Fields(text)
	if len(words) <= count {
		return text
	}
	return strings.TrimRight(strings.Join(words[:count], " "), " ….,:;(") + " …"
}
