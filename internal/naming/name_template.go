package naming

// This file owns the language of name templates. It has the syntax and results of Vault's
// username templates (sdk/helper/template), but allows only a part of the language:
// otherwise anyone with write access to a role could stop the plugin process, which serves
// every mount of this plugin.
//
// What must stay true: no template is executed before its complete parse tree has been
// checked, even if it comes from storage. The allowed part has no loops, so the length of
// the text bounds its time. Every function that can return more than it is given fails
// beyond maxText bytes, and does not allocate much more than that.

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"
	"time"

	"github.com/hashicorp/go-secure-stdlib/base62"

	"vault-plugin-secrets-openai/internal/text"
)

const (
	// maxText bounds, in bytes, each value inside a template and a name before it is
	// truncated.
	maxText = 4 << 10
	// maxPrintf bounds the allocation of printf.
	maxPrintf = 32 * maxText
	// maxWidth is the largest width or precision of printf.
	maxWidth = MaxLength
)

// templateName is the name of the parsed template. {{define}} can replace a
// template of the same name, so this name is longer than a template can spell.
var templateName = strings.Repeat("x", text.MaxLen+1)

// functions and builtins are the allowed functions. The builtins are those of the template
// language that return nothing larger than their arguments.
var (
	functions = template.FuncMap{
		"random":          shortRandom,
		"truncate":        truncate,
		"truncate_sha256": truncateSHA256,
		"uppercase":       func(text string) (string, error) { return bounded("uppercase", strings.ToUpper(text)) },
		"lowercase":       func(text string) (string, error) { return bounded("lowercase", strings.ToLower(text)) },
		"replace":         boundedReplace,
		"sha256":          hexSHA256,
		"base64": func(text string) (string, error) {
			return bounded("base64", base64.StdEncoding.EncodeToString([]byte(text)))
		},
		"unix_time": func() string { return strconv.FormatInt(time.Now().Unix(), 10) },
		"printf":    boundedPrintf,
	}
	builtins = []string{"and", "or", "not", "eq", "ne", "len"}
	fields   = []string{"RoleName", "DisplayName", "ProjectID", "UnixTime", "RandomSuffix"}
)

// nameTemplate is a valid template.
type nameTemplate struct{ checked *template.Template }

// parseTemplate checks a template without executing any of it.
func parseTemplate(source string) (nameTemplate, error) {
	// Before it is parsed, since the parser recurses as deep as the text nests.
	if len(source) > text.MaxLen {
		return nameTemplate{}, fmt.Errorf("the template is %d bytes long; the limit is %d", len(source), text.MaxLen)
	}
	trees := map[string]*parse.Tree{}
	tree := parse.New(templateName)
	tree.Mode = parse.SkipFuncCheck // checkNode has better errors
	if _, err := tree.Parse(source, "", "", trees); err != nil {
		return nameTemplate{}, readable(err)
	}
	if len(trees) != 1 {
		return nameTemplate{}, forbidden(`"define" or "block"`)
	}
	if err := checkNode(tree.Root); err != nil {
		return nameTemplate{}, err
	}
	checked, err := template.New(templateName).Funcs(functions).AddParseTree(templateName, tree)
	return nameTemplate{checked}, err
}

// render executes the template.
func (t nameTemplate) render(data Data) (string, error) {
	// The length of a caller's display name is not limited.
	for _, field := range []*string{&data.RoleName, &data.DisplayName, &data.ProjectID} {
		*field = (*field)[:min(len(*field), text.MaxLen)]
	}
	var out boundedWriter
	if err := t.checked.Execute(&out, data); err != nil {
		return "", readable(err)
	}
	return string(out.text), nil
}

// everyBranchNames reports whether RandomSuffix is on each path through the template's
// branches. A function may still change the suffix, so each name is also checked.
func (t nameTemplate) everyBranchNames() bool { return everyBranchNames(t.checked.Root) }

func everyBranchNames(list *parse.ListNode) bool {
	return list != nil && slices.ContainsFunc(list.Nodes, func(node parse.Node) bool {
		switch n := node.(type) {
		case *parse.ActionNode:
			return strings.Contains(n.String(), ".RandomSuffix")
		case *parse.IfNode:
			return everyBranchNames(n.List) && everyBranchNames(n.ElseList)
		}
		return false
	})
}

// Uses reports whether a template contains a field. A template that cannot be parsed
// contains none.
func Uses(source, field string) bool {
	parsed, err := parseCached(source)
	return err == nil && uses(parsed.checked.Root, field)
}

// uses knows the kinds of nodes that checkNode allows.
func uses(node parse.Node, field string) bool {
	some := func(nodes ...parse.Node) bool {
		return slices.ContainsFunc(nodes, func(n parse.Node) bool { return uses(n, field) })
	}
	switch n := node.(type) {
	case *parse.ListNode:
		return n != nil && some(n.Nodes...)
	case *parse.ActionNode:
		return uses(n.Pipe, field)
	case *parse.IfNode:
		return some(n.Pipe, n.List, n.ElseList)
	case *parse.PipeNode:
		return slices.ContainsFunc(n.Cmds, func(c *parse.CommandNode) bool { return some(c.Args...) })
	case *parse.FieldNode:
		return slices.Contains(n.Ident, field)
	}
	return false
}

// checkNode returns an error for the first part of a tree that is not allowed, including
// all unknown kinds of nodes.
func checkNode(node parse.Node) error {
	switch n := node.(type) {
	case *parse.TextNode, *parse.CommentNode, *parse.StringNode, *parse.NumberNode, *parse.BoolNode:
		return nil
	case *parse.ListNode:
		if n == nil { // no else
			return nil
		}
		return checkNodes(n.Nodes)
	case *parse.ActionNode:
		return checkNode(n.Pipe)
	case *parse.IfNode:
		return checkNodes([]parse.Node{n.Pipe, n.List, n.ElseList})
	case *parse.PipeNode:
		if len(n.Decl) > 0 {
			return checkNode(n.Decl[0])
		}
		return checkNodes(n.Cmds)
	case *parse.CommandNode:
		return checkNodes(n.Args)
	case *parse.FieldNode:
		if len(n.Ident) == 1 && slices.Contains(fields, n.Ident[0]) {
			return nil
		}
		return forbidden("field " + n.String())
	case *parse.IdentifierNode:
		if _, ok := functions[n.Ident]; ok || slices.Contains(builtins, n.Ident) {
			return nil
		}
		return forbidden(fmt.Sprintf("function %q", n.Ident))
	case *parse.VariableNode:
		return forbidden("variable " + n.String())
	case *parse.DotNode:
		return forbidden("the dot without a field")
	case *parse.RangeNode:
		return forbidden(`"range"`)
	case *parse.WithNode:
		return forbidden(`"with"`)
	case *parse.TemplateNode:
		return forbidden(`"template"`)
	}
	return forbidden(node.String())
}

func checkNodes[N parse.Node](nodes []N) error {
	for _, node := range nodes {
		if err := checkNode(node); err != nil {
			return err
		}
	}
	return nil
}

func forbidden(construct string) error {
	return fmt.Errorf("%.80s is not allowed in a name template; use only text, {{if}}, {{else}}, the fields .%s and the functions %s",
		construct, strings.Join(fields, ", ."), strings.Join(allowedFunctions(), ", "))
}

func allowedFunctions() []string {
	names := slices.Clone(builtins)
	for name := range functions {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// longAction matches the template package's quote of the action that failed.
var longAction = regexp.MustCompile(`at <(.{60}).*>: `)

// readable removes the template's name from an error of the template packages, and
// truncates a long action.
func readable(err error) error {
	text := strings.ReplaceAll(err.Error(), "template: "+templateName+":", "line ")
	text = strings.ReplaceAll(text, fmt.Sprintf("executing %q ", templateName), "")
	return errors.New(longAction.ReplaceAllString(text, "at <$1...>: "))
}

// boundedWriter fails after maxText bytes, which stops the execution.
type boundedWriter struct{ text []byte }

func (w *boundedWriter) Write(text []byte) (int, error) {
	if len(w.text)+len(text) > maxText {
		return 0, fmt.Errorf("the name is longer than %d bytes before it is truncated to %d characters", maxText, MaxLength)
	}
	w.text = append(w.text, text...)
	return len(text), nil
}

// bounded returns the result of a function, unless it is too large.
func bounded(function, text string) (string, error) {
	if len(text) > maxText {
		return "", fmt.Errorf("%s returns more than %d bytes", function, maxText)
	}
	return text, nil
}

// shortRandom limits the length to that of a name.
func shortRandom(length int) (string, error) {
	if length < 1 || length > MaxLength {
		return "", fmt.Errorf("random requires a length between 1 and %d", MaxLength)
	}
	return base62.Random(length)
}

func truncate(length int, text string) (string, error) {
	if length <= 0 {
		return "", fmt.Errorf("max length must be > 0 but was %d", length)
	}
	return text[:min(len(text), length)], nil
}

// truncateSHA256 replaces the text beyond length by eight digits of its hash.
func truncateSHA256(length int, text string) (string, error) {
	const digits = 8
	if length <= digits {
		return "", fmt.Errorf("max length must be > %d but was %d", digits, length)
	}
	if len(text) <= length {
		return text, nil
	}
	kept := length - digits
	return text[:kept] + hexSHA256(text[kept:])[:digits], nil
}

func hexSHA256(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// boundedReplace computes the length before it allocates: one call can multiply the length
// by a thousand.
func boundedReplace(find, by, text string) (string, error) {
	if len(text)+strings.Count(text, find)*(len(by)-len(find)) > maxText {
		return "", fmt.Errorf("replace returns more than %d bytes", maxText)
	}
	return strings.ReplaceAll(text, find, by), nil
}

// boundedPrintf checks the format at run time, since it may be computed or come from the
// caller's display name.
func boundedPrintf(format string, args ...any) (string, error) {
	directives, star := 0, false
	for rest := format; ; {
		_, after, found := strings.Cut(rest, "%")
		if !found {
			break
		}
		// Everything that can be between % and the verb. It may be more than fmt
		// accepts, but no directive begins inside it.
		rest = strings.TrimLeft(after, "-+# 0123456789.*[]")
		options := after[:len(after)-len(rest)]
		if strings.HasPrefix(rest, "%") {
			if options != "" { // fmt may parse the next directive here
				return "", fmt.Errorf("printf does not allow options in %%%s%%", options[:min(len(options), maxWidth)])
			}
			rest = rest[1:]
			continue
		}
		for _, number := range strings.FieldsFunc(options, func(r rune) bool { return r < '0' || r > '9' }) {
			if n, err := strconv.Atoi(number); err != nil || n > maxWidth {
				return "", errWidth
			}
		}
		star = star || strings.Contains(options, "*")
		directives++
	}
	longest := 0
	for _, arg := range args {
		switch arg := arg.(type) {
		case string:
			longest = max(longest, len(arg))
		case int:
			// With * any argument may be a width.
			if star && max(arg, -arg) > maxWidth {
				return "", errWidth
			}
		case int64: // UnixTime, which is too large for a width
			if wide := max(arg, -arg); star && wide > maxWidth && wide <= maxFmtWidth {
				return "", errWidth
			}
		}
	}
	// %# x writes five bytes per byte, a float has up to about 300 digits, and fmt adds
	// unused arguments.
	if len(format)+(directives+len(args))*(5*longest+1024) > maxPrintf {
		return "", fmt.Errorf("printf may return more than %d bytes", maxPrintf)
	}
	return bounded("printf", fmt.Sprintf(format, args...))
}

// maxFmtWidth is the width beyond which fmt treats a * argument as an error.
const maxFmtWidth = 1_000_000

var errWidth = fmt.Errorf("printf widths, precisions and argument numbers must be at most %d", maxWidth)
