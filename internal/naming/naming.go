// Package naming generates the names of accounts and keys at OpenAI, and recognizes a
// mount's own names; name_template.go owns the templates.
//
// What must stay true: a name always contains the complete mount tag and random suffix,
// even if the rest is truncated, since the WAL and tidy search for them.
package naming

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/hashicorp/go-secure-stdlib/base62"
	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	// RandomLength is how many random characters follow the mount tag in
	// .RandomSuffix: about fifty bits.
	RandomLength = 10
	// MaxLength bounds an account's name, in characters. OpenAI publishes no limit;
	// other tools use this one.
	MaxLength = 64
	// maxParsed covers the roles with their own template, which are few.
	maxParsed = 256
)

// parsedTemplates caches valid templates by their text, since parsing one costs more than
// rendering it.
var parsedTemplates, _ = lru.New[string, nameTemplate](maxParsed) // its only error is a size below 1

// Data has the fields of a name template.
type Data struct {
	RoleName, DisplayName, ProjectID string
	UnixTime                         int64
	// RandomSuffix is the mount tag and RandomLength random characters.
	RandomSuffix string
}

// Name renders a name of at most MaxLength characters that contains the complete
// RandomSuffix.
func Name(text string, data Data) (string, error) {
	parsed, err := parseCached(text)
	if err != nil {
		return "", err
	}
	rendered, err := parsed.render(data)
	if err != nil {
		return "", err
	}
	before, after, found := strings.Cut(rendered, data.RandomSuffix)
	if !found {
		return "", fmt.Errorf("the template must contain {{.RandomSuffix}} unchanged, so that each name is unique; it renders as %.80q", rendered)
	}
	// OpenAI might trim spaces at the ends, but the WAL finds an account by its exact
	// name.
	before, after = strings.TrimLeft(plain(before), " "), strings.TrimRight(plain(after), " ")
	// The text after the suffix is truncated before the text that precedes it.
	room := MaxLength - len(data.RandomSuffix)
	before = before[:min(len(before), room)]
	after = after[:min(len(after), room-len(before))]
	return before + data.RandomSuffix + strings.TrimRight(after, " "), nil
}

// parseCached returns a valid template.
func parseCached(text string) (nameTemplate, error) {
	parsed, known := parsedTemplates.Get(text)
	if known {
		return parsed, nil
	}
	parsed, err := parseTemplate(text)
	if err == nil {
		parsedTemplates.Add(text, parsed)
	}
	return parsed, err
}

// Check returns an error for an invalid template of a role. It renders two samples that
// differ in all fields but the role. That does not cover all data, so each name is checked
// again when it is generated.
func Check(text, roleName, project string) error {
	for _, sample := range []Data{
		{RoleName: roleName, DisplayName: "token", ProjectID: project, UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn"},
		{RoleName: roleName, DisplayName: "oidc-Zoë@example.com", ProjectID: "proj_0123456789abcdef", UnixTime: 4102444799, RandomSuffix: "z9yxw8vutsrq7po"},
	} {
		if _, err := Name(text, sample); err != nil {
			return err
		}
	}
	parsed, err := parseCached(text)
	if err == nil && !parsed.everyBranchNames() {
		err = errors.New("a branch of {{if}} lacks {{.RandomSuffix}}, which makes each name unique; add it to every branch or outside of {{if}}")
	}
	return err
}

// plain replaces each character that may not be allowed in a name by a dash, so that the
// result is ASCII.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(" ._@-", r) {
			return r
		}
		return '-'
	}, text)
}

// TagLength is how many characters a mount tag has.
const TagLength = 5

// Random returns n random lower-case letters and digits, of about five bits each.
func Random(n int) (string, error) {
	text, err := base62.Random(n)
	return strings.ToLower(text), err
}

// BearsTag returns a function that recognizes this mount's names: the tag followed by
// RandomLength random characters, at any position.
func BearsTag(tag string) (func(name string) bool, error) {
	if len(tag) != TagLength {
		return nil, fmt.Errorf("invalid mount tag: it has %d characters instead of %d", len(tag), TagLength)
	}
	pattern, err := regexp.Compile(regexp.QuoteMeta(tag) + fmt.Sprintf("[a-z0-9]{%d}", RandomLength))
	if err != nil {
		return nil, err
	}
	return pattern.MatchString, nil
}

const (
	// DefaultTemplate is for roles without their own template.
	DefaultTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"
	// StaticTemplate is for static roles.
	StaticTemplate = "vault-static-{{.RoleName}}-{{.RandomSuffix}}"
)
