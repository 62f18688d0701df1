// Package config reads configuration: YAML, decoded strictly, with errors that
// say where the mistake is and what was probably meant.
//
// A program describes its configuration as a struct whose fields carry yaml
// tags, reads a file with [ReadFile], adds what its flags say as [Setting]s and
// calls [Decode]. Checks that need more than types belong to the program; it
// reports them with [Source.Errorf], which finds the place in the file.
//
// Only plain YAML is understood: mappings, lists and scalars in one document.
// Anchors, aliases, tags, merge keys and directives are refused. These struct
// tags have a meaning:
//
//	yaml:"name"        the key; a field without it is not configuration
//	yaml:",inline"     the keys of an embedded struct belong to this one
//	env:"expand"       ${VAR} is replaced from the environment; $${ is a plain ${
//	oneof:"a,b"        the only values that this string may have
//
// Fields may be strings, booleans, numbers, structs, pointers to structs (nil
// where the key is missing), slices, maps with string keys, and whatever
// implements [encoding.TextUnmarshaler], such as [Duration].
package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
)

// Bounds of one configuration. The parser's time grows with the square of the
// number of keys in a mapping, so that bound is what keeps Decode quick.
const (
	MaxSize   = 1 << 20 // bytes
	maxTokens = 100_000 // words, separators and punctuation of YAML
	maxDepth  = 64      // lists and mappings within each other on one line
	maxErrors = 10      // mistakes reported at once
)

// Source is a configuration before it is decoded: a file's content and what
// overrides it. The zero value is an empty configuration.
type Source struct {
	Name string    // of the file, for errors; empty if there is none
	Data []byte    // YAML, at most MaxSize
	Set  []Setting // overrides, applied in order after the file

	// Reload receives when the file is to be read again ([Follow]). Nil: never.
	Reload <-chan os.Signal
}

// Setting overrides one value of a configuration.
type Setting struct {
	Path  string // of the key, its parts joined by dots: log.level
	Value string // as it would stand in the file, unquoted; a list is split at commas
	From  string // what gave it, for errors: --log-level
}

// Error is one mistake in a configuration.
type Error struct {
	Name    string // of the file, or of the flag; may be empty
	Line    int    // from 1; 0 if the mistake has no place in a file
	Column  int    // from 1, in characters; 0 as for Line
	Message string
	Snippet string // the line, quoted, with a mark below the column; empty without a place
}

// Error returns name:line:column: message, and the snippet on lines of its own.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Name != "" {
		b.WriteString(e.Name)
		if e.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
		}
		b.WriteString(": ")
	} else if e.Line > 0 {
		fmt.Fprintf(&b, "line %d, column %d: ", e.Line, e.Column)
	}
	b.WriteString(e.Message)
	if e.Snippet != "" {
		b.WriteByte('\n')
		b.WriteString(e.Snippet)
	}
	return b.String()
}

// ReadFile reads a configuration file. It fails if the file is larger than
// [MaxSize].
func ReadFile(path string) (Source, error) {
	f, err := os.Open(path)
	if err != nil {
		return Source{}, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return Source{}, fmt.Errorf("read configuration: %w", err)
	}
	if len(data) > MaxSize {
		return Source{}, fmt.Errorf("read configuration: %s is larger than %d bytes", path, MaxSize)
	}
	return Source{Name: path, Data: data}, nil
}

// Decode reads a configuration into a struct (or a slice, or a map) that into
// points to. What src does not name stays as it was, so defaults are set
// before the call.
//
// The error joins every mistake found, up to ten; each is an [*Error].
func Decode(src Source, into any) error {
	root, err := src.parse()
	if err != nil {
		return err
	}
	d := decoder{src: src}
	d.decode(root, into)
	if len(d.errs) == 0 {
		for _, s := range src.Set {
			d.set(s, into)
		}
	}
	return errors.Join(d.errs...)
}

// Errorf makes an error about the value at a path (its parts joined by dots,
// list items by their index from 0). It points to where the value was given:
// the flag, the line of the file, or just the file if the key is missing.
func (src Source) Errorf(path, format string, args ...any) error {
	message := fmt.Sprintf(format, args...)
	for i := len(src.Set) - 1; i >= 0; i-- {
		if s := src.Set[i]; s.Path == path {
			return &Error{Name: s.From, Message: message}
		}
	}
	root, err := src.parse()
	if err != nil {
		return &Error{Name: src.Name, Message: message}
	}
	node := find(root, strings.Split(path, "."))
	if node == nil {
		return &Error{Name: src.Name, Message: message}
	}
	return src.errorAt(position(node), message)
}

// Lookup returns the text of the single value at a path: what a setting gives
// it, else what stands in the file. It reports false if the path is not given,
// or is a list or a mapping.
func (src Source) Lookup(path string) (string, bool) {
	for i := len(src.Set) - 1; i >= 0; i-- {
		if s := src.Set[i]; s.Path == path {
			return s.Value, true
		}
	}
	root, err := src.parse()
	if err != nil {
		return "", false
	}
	return scalarText(find(root, strings.Split(path, ".")))
}

// Keys returns the keys at the top of the file, none if it cannot be read.
func (src Source) Keys() (keys []string) {
	root, err := src.parse()
	if m, ok := root.(*ast.MappingNode); ok && err == nil {
		for _, kv := range m.Values {
			if key, ok := keyText(kv.Key); ok {
				keys = append(keys, key)
			}
		}
	}
	return keys
}

// find returns the node at a path, or nil.
func find(node ast.Node, path []string) ast.Node {
	for _, part := range path {
		var next ast.Node
		switch n := node.(type) {
		case *ast.MappingNode:
			for _, kv := range n.Values {
				if k, ok := keyText(kv.Key); ok && k == part {
					next = kv.Value
				}
			}
		case *ast.SequenceNode:
			if i, err := strconv.Atoi(part); err == nil && i >= 0 && i < len(n.Values) {
				next = n.Values[i]
			}
		}
		if next == nil {
			return nil
		}
		node = next
	}
	return node
}

// errorAt makes an error with the line it is about.
func (src Source) errorAt(p place, message string) *Error {
	e := &Error{Name: src.Name, Line: p.line, Column: p.column, Message: message}
	if p.line < 1 {
		e.Line, e.Column = 0, 0
		return e
	}
	const maxLine = 160 // characters shown
	lines := strings.Split(string(src.Data), "\n")
	if p.line > len(lines) {
		return e
	}
	text := []rune(strings.TrimRight(strings.ToValidUTF8(lines[p.line-1], string(utf8.RuneError)), "\r"))
	if p.column > maxLine {
		return e
	}
	if len(text) > maxLine {
		text = append(text[:maxLine:maxLine], '…')
	}
	// Tabs before the mark stay tabs, so that it stands below its column.
	pad := make([]rune, 0, p.column)
	for i := range p.column - 1 {
		if i < len(text) && text[i] == '\t' {
			pad = append(pad, '\t')
		} else {
			pad = append(pad, ' ')
		}
	}
	number := strconv.Itoa(p.line)
	e.Snippet = fmt.Sprintf("  %s | %s\n  %s | %s^", number, string(text), strings.Repeat(" ", len(number)), string(pad))
	return e
}
