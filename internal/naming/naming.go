// Package naming says how what is made at OpenAI is named, and which names are a
// mount's own; name_template.go owns what a template may do.
//
// What must stay true: a name always carries the mount's tag and a random tail,
// whatever is cut; what the journal and the sweep look for is exactly this.
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
	// RandomLength is how many random characters follow the mount's tag in
	// .RandomSuffix: about fifty bits.
	RandomLength = 10
	// MaxLength bounds an account's name, in characters. OpenAI publishes
	// no limit; this is what the tools around it use.
	MaxLength = 64
	// maxParsed is for the roles of a mount that have a template of their
	// own, which are few.
	maxParsed = 256
)

// parsedTemplates are the templates last used, by their text: to parse one costs
// more than to render it. Only those that passed the check are kept, so none is
// longer than text.MaxLen.
var parsedTemplates, _ = lru.New[string, nameTemplate](maxParsed) // its only error is a size below 1

// Data is what a name template can use.
type Data struct {
	RoleName, DisplayName, ProjectID string
	UnixTime                         int64
	// RandomSuffix is the mount's tag and RandomLength random characters.
	RandomSuffix string
}

// Name renders a name of at most MaxLength characters in which
// RandomSuffix stands whole. An error says what the template gave, or what in it
// is not allowed.
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
		return "", fmt.Errorf("it must contain {{.RandomSuffix}} unchanged, which makes each name unique; it gives %.80q", rendered)
	}
	// No space at either end, which OpenAI might trim: the journal finds an
	// account by exactly this name.
	before, after = strings.TrimLeft(plain(before), " "), strings.TrimRight(plain(after), " ")
	// What follows the suffix is cut before what precedes it.
	room := MaxLength - len(data.RandomSuffix)
	before = before[:min(len(before), room)]
	after = after[:min(len(after), room-len(before))]
	return before + data.RandomSuffix + strings.TrimRight(after, " "), nil
}

// parseCached returns a template that has passed the check.
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

// Check says what is wrong with the template of a role. Two samples
// that differ in all but the role show a template that depends on one of them.
// Nothing here is a promise for all data: each name is checked when it is made.
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
		err = errors.New("a branch of {{if}} has no {{.RandomSuffix}}, which makes each name unique; put it into every branch or outside of them")
	}
	return err
}

// plain replaces all that is not sure to be allowed in a name, one dash
// for each character, so that the result is ASCII.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(" ._@-", r) {
			return r
		}
		return '-'
	}, text)
}

const (
	// TagLength is how many characters a mount's tag has.
	TagLength = 5
)

// Random returns n random lower-case letters and digits, about five bits
// each.
func Random(n int) (string, error) {
	text, err := base62.Random(n)
	return strings.ToLower(text), err
}

// BearsTag returns what tells this mount's names: the tag and the random
// characters that follow it, wherever a template has put them.
func BearsTag(tag string) (func(name string) bool, error) {
	if len(tag) != TagLength {
		return nil, fmt.Errorf("the mount's tag has %d characters instead of %d, so no name is known to be this mount's", len(tag), TagLength)
	}
	pattern, err := regexp.Compile(regexp.QuoteMeta(tag) + fmt.Sprintf("[a-z0-9]{%d}", RandomLength))
	if err != nil {
		return nil, err
	}
	return pattern.MatchString, nil
}

const (
	// DefaultTemplate names what is made for a role, unless it has its own.
	DefaultTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"
	// StaticTemplate names what is made for a static role.
	StaticTemplate = "vault-static-{{.RoleName}}-{{.RandomSuffix}}"
)
