package x509pop

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The templates of agents' paths when none is configured.
const (
	defaultTemplate     = "{{ .PluginName }}/{{ .Fingerprint }}"
	defaultSVIDTemplate = "{{ .PluginName }}/{{ .SVIDPathTrimmed }}"
)

const (
	maxTemplate = 4 << 10 // bytes
	maxPath     = 2 << 10 // bytes; a whole SPIFFE ID has no more
)

// pathTemplate makes the path of an agent's SPIFFE ID out of a certificate.
//
// The slashes of the path are those of the template: a value may only hold the
// characters of a path segment, and must not be empty. So no certificate can
// name an agent whose path has another shape than was configured, and with a
// slash between two values, no two pairs of them make the same path.
type pathTemplate struct{ t *template.Template }

// pathData is what a template is executed with.
type pathData struct {
	*x509.Certificate // all its fields, for example .Subject.CommonName or .DNSNames

	PluginName      string // x509pop
	TrustDomain     string // of the server
	Fingerprint     string // SHA-1 of the certificate, hexadecimal
	SerialNumberHex string
	SVIDPathTrimmed svidPath          // empty in mode external_pki
	URISanSelectors map[string]string // as in the selectors san:<key>:<value>; of two with one key the last
}

// svidPath is a path, or the end of one, that is valid already. It is the one
// value that may have slashes.
type svidPath string

// Functions for templates. Their subject comes last, for use in a pipeline.
var pathFuncs = template.FuncMap{
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

// valueError is what is wrong with one value of a certificate.
type valueError struct{ text string }

func (e *valueError) Error() string { return e.text }

// checkValue is the last function of every pipeline that writes into a path. It
// gets the pipeline's text, for errors, and its value.
func checkValue(pipeline string, v any) (string, error) {
	if p, ok := v.(svidPath); ok && p != "" {
		return string(p), nil
	}
	text := fmt.Sprint(v)
	if text == "" {
		return "", &valueError{fmt.Sprintf("its %s is empty", pipeline)}
	}
	if spiffeid.ValidatePathSegment("x"+text) != nil { // the x, as "." may be a part of a segment
		return "", &valueError{fmt.Sprintf("its %s is %q, which cannot be part of a SPIFFE ID: letters, digits, '-', '_' and '.' are allowed",
			pipeline, clip(text))}
	}
	return text, nil
}

// parseTemplate makes a template, and tries it on a certificate that has one of
// everything.
func parseTemplate(text string) (*pathTemplate, error) {
	if len(text) > maxTemplate {
		return nil, fmt.Errorf("it is %d bytes long; the most is %d", len(text), maxTemplate)
	}
	t, err := template.New("agent_path_template").Option("missingkey=error").Funcs(pathFuncs).Parse(text)
	if err != nil {
		return nil, err
	}
	for _, t := range t.Templates() {
		if t.Tree != nil {
			checkOutput(t.Tree.Root)
		}
	}
	p := &pathTemplate{t}
	// What is wrong with a value, or that there are fewer than the template
	// counts on, is the sample's fault. A field that no certificate has, and a
	// path that never is one, are the template's.
	_, err = p.path(sample())
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

// path executes the template. The path begins with the attestor's name: those of
// other attestors are not to be had.
func (p *pathTemplate) path(data pathData) (string, error) {
	var out boundedWriter
	if err := p.t.Execute(&out, data); err != nil {
		if value := (*valueError)(nil); errors.As(err, &value) {
			return "", value // without the place in the template
		}
		return "", err
	}
	path := strings.TrimPrefix(out.b.String(), "/")
	if err := spiffeid.ValidatePath("/" + path); err != nil {
		return "", fmt.Errorf("path is %q: %w", clip(path), err)
	}
	if !strings.HasPrefix(path, Name+"/") {
		return "", fmt.Errorf("path is %q, which does not begin with %s/", clip(path), Name)
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

// sample is a certificate that has one of everything.
func sample() pathData {
	const word = "sample"
	words := []string{word}
	name := pkix.Name{
		Country: words, Organization: words, OrganizationalUnit: words, Locality: words, Province: words,
		StreetAddress: words, PostalCode: words, SerialNumber: word, CommonName: word,
	}
	return pathData{
		Certificate: &x509.Certificate{
			SerialNumber: big.NewInt(1), Issuer: name, Subject: name,
			DNSNames: words, EmailAddresses: words, IPAddresses: []net.IP{net.IPv4zero}, URIs: []*url.URL{{Scheme: word, Host: word}},
			SubjectKeyId: []byte(word), AuthorityKeyId: []byte(word),
		},
		PluginName: Name, TrustDomain: word, Fingerprint: strings.Repeat("0a", sha1.Size), SerialNumberHex: "0a", SVIDPathTrimmed: word,
		URISanSelectors: map[string]string{word: word},
	}
}
