package openaisecrets

// This file owns how what is made at OpenAI is named; name_template.go owns what
// a template may do.
//
// What must stay true: a name always carries the mount's tag and a random tail,
// whatever is cut; what the journal and the sweep look for is exactly this.

import (
	"errors"
	"fmt"
	"strings"

	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	// randomLength is how many random characters follow the mount's tag in
	// .RandomSuffix: about fifty bits.
	randomLength = 10
	// maxNameLength bounds an account's name, in characters. OpenAI publishes
	// no limit; this is what the tools around it use.
	maxNameLength = 64
	// maxParsedNames is for the roles of a mount that have a template of their
	// own, which are few.
	maxParsedNames = 256
)

// parsedNames are the templates last used, by their text: to parse one costs
// more than to render it. Only those that passed the check are kept, so none is
// longer than text.MaxLen.
var parsedNames, _ = lru.New[string, nameTemplate](maxParsedNames) // its only error is a size below 1

// nameData is what a name template can use.
type nameData struct {
	RoleName, DisplayName, ProjectID string
	UnixTime                         int64
	// RandomSuffix is the mount's tag and randomLength random characters.
	RandomSuffix string
}

// accountName renders a name of at most maxNameLength characters in which
// RandomSuffix stands whole. An error says what the template gave, or what in it
// is not allowed.
func accountName(text string, data nameData) (string, error) {
	parsed, err := parsedName(text)
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
	before, after = strings.TrimLeft(plainName(before), " "), strings.TrimRight(plainName(after), " ")
	// What follows the suffix is cut before what precedes it.
	room := maxNameLength - len(data.RandomSuffix)
	before = before[:min(len(before), room)]
	after = after[:min(len(after), room-len(before))]
	return before + data.RandomSuffix + strings.TrimRight(after, " "), nil
}

// parsedName returns a template that has passed the check.
func parsedName(text string) (nameTemplate, error) {
	parsed, known := parsedNames.Get(text)
	if known {
		return parsed, nil
	}
	parsed, err := parseNameTemplate(text)
	if err == nil {
		parsedNames.Add(text, parsed)
	}
	return parsed, err
}

// checkNameTemplate says what is wrong with the template of a role. Two samples
// that differ in all but the role show a template that depends on one of them.
// Nothing here is a promise for all data: each name is checked when it is made.
func checkNameTemplate(text, roleName, project string) error {
	for _, sample := range []nameData{
		{RoleName: roleName, DisplayName: "token", ProjectID: project, UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn"},
		{RoleName: roleName, DisplayName: "oidc-Zoë@example.com", ProjectID: "proj_0123456789abcdef", UnixTime: 4102444799, RandomSuffix: "z9yxw8vutsrq7po"},
	} {
		if _, err := accountName(text, sample); err != nil {
			return err
		}
	}
	parsed, err := parsedName(text)
	if err == nil && !parsed.everyBranchNames() {
		err = errors.New("a branch of {{if}} has no {{.RandomSuffix}}, which makes each name unique; put it into every branch or outside of them")
	}
	return err
}

// plainName replaces all that is not sure to be allowed in a name, one dash
// for each character, so that the result is ASCII.
func plainName(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(" ._@-", r) {
			return r
		}
		return '-'
	}, text)
}
