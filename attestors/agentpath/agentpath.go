// Package agentpath makes the path of an agent's SPIFFE ID out of what an
// attestor has verified of its node, as a template says. It is no attestor.
package agentpath

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
)

const (
	maxTemplate = 4 << 10 // bytes
	maxPath     = 2 << 10 // bytes; a whole SPIFFE ID has no more
)

// Template makes paths.
//
// The slashes of the path are those of the template: a value may only hold the
// characters of a path segment, and must not be empty. So nothing that a node
// shows can name an agent whose path has another shape than was configured, and
// with a slash between two values, no two pairs of them make the same path.
type Template struct {
	name string // of the attestor, with which every path begins
	t    *template.Template
}

// Valid is a path, or the end of one, that is valid already. It is the one value
// that may have slashes.
type Valid string

// Functions for templates. Their subject comes last, for use in a pipeline.
var funcs = template.FuncMap{
	"lower":      func(v any) string { return strings.ToLower(fmt.Sprint(v)) },
	"replace":    func(from, to string, v any) string { return strings.ReplaceAll(fmt.Sprint(v), from, to) },
	"trimPrefix": func(prefix string, v any) string { return strings.TrimPrefix(fmt.Sprint(v), prefix) },
	"trimSuffix": func(suffix string, v any) string { return strings.TrimSuffix(fmt.Sprint(v), suffix) },
	"sha256sum": func(v any) string {
		sum := sha256.Sum256([]byte(fmt.Sprint(v)))
		return hex.EncodeToString(sum[:])
	},
	checkFunc: checkValue,
}

const checkFunc = "_path"

// valueError is what is wrong with one value.
type valueError struct{ text string }

func (e *valueError) Error() string { return e.text }

// checkValue is the last function of every pipeline that writes into a path. It
// gets the pipeline's text, for errors, and its value.
func checkValue(pipeline string, v any) (string, error) {
	if p, ok := v.(Valid); ok && p != "" {
		return string(p), nil
	}
	text := fmt.Sprint(v)
	if text == "" {
		return "", &valueError{fmt.Sprintf("its %s is empty", pipeline)}
	}
	if spiffeid.ValidatePathSegment("x"+text) != nil { // the x, as "." may be a part of a segment
		return "", &valueError{fmt.Sprintf("its %s is %q, which cannot be part of a SPIFFE ID: letters, digits, '-', '_' and '.' are allowed",
			pipeline, attestors.Clip(text))}
	}
	return text, nil
}

// Parse makes a template for the attestor of a name, and tries it on data that
// has one of everything.
func Parse(name, text string, sample any) (*Template, error) {
	if len(text) > maxTemplate {
		return nil, fmt.Errorf("it is %d bytes long; the most is %d", len(text), maxTemplate)
	}
	t, err := template.New("agent_path_template").Option("missingkey=error").Funcs(funcs).Parse(text)
	if err != nil {
		return nil, err
	}
	for _, t := range t.Templates() {
		if t.Tree != nil {
			checkOutput(t.Tree.Root)
		}
	}
	p := &Template{name, t}
	// What is wrong with a value, or that there are fewer than the template
	// counts on, is the sample's fault. A field that there never is, and a
	// path that never is one, are the template's.
	_, err = p.Path(sample)
	var exec template.ExecError
	var value *valueError
	if errors.As(err, &value) || errors.As(err, &exec) && !strings.Contains(err.Error(), "can't evaluate field") {
		return p, nil
	}
	return p, err
}

// checkOutput makes every action below a node check what it writes.
func checkOutput(n parse.Node) {
	switch n := n.(type) {
	case *parse.ListNode:
		if n == nil {
			return
		}
		for _, n := range n.Nodes {
			checkOutput(n)
		}
	case *parse.ActionNode:
		if len(n.Pipe.Decl) > 0 {
			return // sets a variable and writes nothing
		}
		pipeline := n.Pipe.String()
		n.Pipe.Cmds = append(n.Pipe.Cmds, &parse.CommandNode{
			NodeType: parse.NodeCommand,
			Pos:      n.Pos,
			Args: []parse.Node{
				parse.NewIdentifier(checkFunc).SetPos(n.Pos),
				&parse.StringNode{NodeType: parse.NodeString, Pos: n.Pos, Quoted: strconv.Quote(pipeline), Text: pipeline},
			},
		})
	case *parse.IfNode:
		checkOutput(n.List)
		checkOutput(n.ElseList)
	case *parse.RangeNode:
		checkOutput(n.List)
		checkOutput(n.ElseList)
	case *parse.WithNode:
		checkOutput(n.List)
		checkOutput(n.ElseList)
	}
}

// Path executes the template. The path begins with the attestor's name: those of
// other attestors are not to be had.
func (p *Template) Path(data any) (string, error) {
	var out boundedWriter
	if err := p.t.Execute(&out, data); err != nil {
		if value := (*valueError)(nil); errors.As(err, &value) {
			return "", value // without the place in the template
		}
		return "", err
	}
	path := strings.TrimPrefix(out.b.String(), "/")
	if err := spiffeid.ValidatePath("/" + path); err != nil {
		return "", fmt.Errorf("path is %q: %w", attestors.Clip(path), err)
	}
	if !strings.HasPrefix(path, p.name+"/") {
		return "", fmt.Errorf("path is %q, which does not begin with %s/", attestors.Clip(path), p.name)
	}
	return path, nil
}

// boundedWriter takes as much as a path may have.
type boundedWriter struct{ b strings.Builder }

func (w *boundedWriter) Write(p []byte) (int, error) {
	if w.b.Len()+len(p) > maxPath {
		return 0, fmt.Errorf("the path is longer than %d bytes", maxPath)
	}
	return w.b.Write(p)
}
