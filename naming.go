package openaisecrets

// This file owns how what is made at OpenAI is named.
//
// What must stay true: a name always carries the mount's tag and a random tail,
// whatever is cut; what the journal and the sweep look for is exactly this.

import (
	"fmt"
	"strings"

	"github.com/hashicorp/go-secure-stdlib/base62"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/helper/template"
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
// more than to render it.
var parsedNames, _ = lru.New[string, template.StringTemplate](maxParsedNames) // its only error is a size below 1

// nameData is what a name template can use.
type nameData struct {
	RoleName, DisplayName, ProjectID string
	UnixTime                         int64
	// RandomSuffix is the mount's tag and randomLength random characters.
	RandomSuffix string
}

// accountName renders a name of at most maxNameLength characters in which
// RandomSuffix stands whole. An error says what the template gave.
func accountName(text string, data nameData) (string, error) {
	parsed, known := parsedNames.Get(text)
	if !known {
		var err error
		if parsed, err = template.NewTemplate(template.Template(text), template.Function("random", shortRandom)); err != nil {
			return "", err
		}
		parsedNames.Add(text, parsed)
	}
	rendered, err := parsed.Generate(data)
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

// shortRandom is the template function random, for as much as fits a name.
func shortRandom(length int) (string, error) {
	if length < 1 || length > maxNameLength {
		return "", fmt.Errorf("random takes a length between 1 and %d", maxNameLength)
	}
	return base62.Random(length)
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
