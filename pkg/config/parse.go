package config

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// place is a position in a file, from 1; zero if unknown.
type place struct{ line, column int }

func placeOf(t *token.Token) place {
	if t == nil || t.Position == nil {
		return place{}
	}
	return place{t.Position.Line, max(t.Position.Column, 1)}
}

func position(n ast.Node) place {
	// A mapping's own token is its first colon; its first key is the start.
	if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
		return position(m.Values[0].Key)
	}
	return placeOf(n.GetToken())
}

// refused names the parts of YAML that configurations do without: they make
// a file mean something else than it shows, and let a short one grow without
// bound.
var refused = map[token.Type]string{
	token.AnchorType:     "anchors (&name) are not supported",
	token.AliasType:      "aliases (*name) are not supported; quote a value that begins with an asterisk",
	token.TagType:        "tags (!name) are not supported; quote a value that begins with an exclamation mark",
	token.MergeKeyType:   "merge keys (<<) are not supported",
	token.MappingKeyType: "complex keys (?) are not supported",
	token.DirectiveType:  "directives (%) are not supported",
}

// parse returns the one document's content, nil if it is empty.
func (src Source) parse() (ast.Node, error) {
	if len(src.Data) > MaxSize {
		return nil, &Error{Name: src.Name, Message: fmt.Sprintf("configuration is larger than %d bytes", MaxSize)}
	}
	if !utf8.Valid(src.Data) {
		return nil, &Error{Name: src.Name, Message: "configuration is not UTF-8 text"}
	}
	tokens := lexer.Tokenize(string(src.Data))
	if err := src.checkTokens(tokens); err != nil {
		return nil, err
	}
	file, err := parser.Parse(tokens, 0)
	if err != nil {
		return nil, src.syntaxError(err)
	}
	var root ast.Node
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if root != nil {
			return nil, src.errorAt(position(doc.Body), "a second document begins; a configuration is one")
		}
		root = doc.Body
	}
	return root, nil
}

func (src Source) checkTokens(tokens token.Tokens) error {
	if len(tokens) > maxTokens {
		return &Error{Name: src.Name, Message: fmt.Sprintf("configuration has more than %d words", maxTokens)}
	}
	flow, line, dashes := 0, 0, 0
	for _, t := range tokens {
		if message, ok := refused[t.Type]; ok {
			return src.errorAt(placeOf(t), message)
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType:
			if t.Position.Line != line {
				line, dashes = t.Position.Line, 0
			}
			dashes++
		}
		if flow > maxDepth || dashes > maxDepth {
			return src.errorAt(placeOf(t), fmt.Sprintf("more than %d lists or mappings within each other", maxDepth))
		}
	}
	return nil
}

// syntaxError puts a failure of the parser into our form.
func (src Source) syntaxError(err error) error {
	var at yaml.Error
	if !errors.As(err, &at) {
		return &Error{Name: src.Name, Message: err.Error()}
	}
	message := at.GetMessage()
	var duplicate *yaml.DuplicateKeyError
	var syntax *yaml.SyntaxError
	switch {
	case errors.As(err, &duplicate), errors.As(err, &syntax) && duplicateMessage.MatchString(message):
		if m := duplicateMessage.FindStringSubmatch(message); m != nil {
			message = fmt.Sprintf("key `%s` is given twice, first on line %s", m[1], m[2])
		}
	}
	return src.errorAt(placeOf(at.GetToken()), message)
}
