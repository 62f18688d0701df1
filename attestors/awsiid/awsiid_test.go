package awsiid_test

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestAnInstanceIsWhatItsDocumentSays(t *testing.T) {
	aws := harness.NewAWS(t, started())
	proof, err := newAgent(t, aws).Proof(t.Context())
	must(t, err)
	e, err := newServer(t, trusting(aws), awsiid.Options{}).Verify(t.Context(), proof, unasked(t))
	must(t, err)
	if want := "aws_iid/123456789012/us-west-2/i-1234567890abcdef0"; e.Path != want {
		t.Errorf("path is %s, want %s", e.Path, want)
	}
	if e.CanReattest || !e.Once {
		t.Error("the document admits more than once")
	}
	want := []string{
		"aws_iid:account_id:123456789012", "aws_iid:az:us-west-2a", "aws_iid:image:id:ami-5fb8c835",
		"aws_iid:instance:id:i-1234567890abcdef0", "aws_iid:region:us-west-2",
	}
	if got := values(e); !slices.Equal(got, want) {
		t.Errorf("selectors are %q", got)
	}
}

func TestAnOperatorMayAdmitInstancesAgain(t *testing.T) {
	aws := harness.NewAWS(t, started())
	c := trusting(aws)
	c.AllowReattestation = true
	e, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t))
	must(t, err)
	if !e.CanReattest || e.Once {
		t.Errorf("the evidence is %+v", e)
	}
}

func TestATemplateNamesTheAgent(t *testing.T) {
	i := started()
	i.Tags = map[string]string{"Name": "web-1"}
	aws, c := describing(t, i)
	c.AgentPathTemplate = "{{ .PluginName }}/{{ .Region }}/{{ .InstanceType }}/{{ .Tags.Name }}"
	e, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, i.Document(), aws.Sign(t, i.Document())), unasked(t))
	must(t, err)
	if e.Path != "aws_iid/us-west-2/t2.micro/web-1" {
		t.Errorf("path is %s", e.Path)
	}
	i.Tags["Name"] = "../../server"
	aws.Set(i)
	if _, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, i.Document(), aws.Sign(t, i.Document())), unasked(t)); err == nil {
		t.Error("a tag with slashes makes a path")
	}
	delete(i.Tags, "Name")
	aws.Set(i)
	if _, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, i.Document(), aws.Sign(t, i.Document())), unasked(t)); err == nil {
		t.Error("an instance without the tag has a path")
	}
}

// describing is AWS with APIs, and a configuration by which they are asked.
func describing(t testing.TB, i harness.EC2Instance) (*harness.AWS, awsiid.ServerConfig) {
	t.Helper()
	aws := harness.NewAWS(t, i)
	aws.Key("AKIASERVER", "secret")
	if t, ok := t.(*testing.T); ok {
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIASERVER")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
		t.Setenv("AWS_SESSION_TOKEN", "")
	}
	api := httptest.NewServer(aws.API())
	t.Cleanup(api.Close)
	c := trusting(aws)
	c.Describe = &awsiid.DescribeConfig{Endpoint: api.URL}
	return aws, c
}

func TestTheEC2APISaysMore(t *testing.T) {
	i := started()
	i.Tags = map[string]string{"Name": "web-1", "team": "shop"}
	i.Groups = [][2]string{{"sg-01234567", "web"}}
	i.Profile = "Blog"
	aws, c := describing(t, i)
	e, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, i.Document(), aws.Sign(t, i.Document())), unasked(t))
	must(t, err)
	for _, want := range []string{
		"aws_iid:tag:Name:web-1", "aws_iid:tag:team:shop", "aws_iid:sg:id:sg-01234567", "aws_iid:sg:name:web",
		"aws_iid:iamrole:arn:aws:iam::123456789012:role/Blog",
	} {
		if !slices.Contains(values(e), want) {
			t.Errorf("no %s in %q", want, values(e))
		}
	}
	c.Describe.DisableInstanceProfileSelectors = true
	before := len(aws.Asked())
	e, err = newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, i.Document(), aws.Sign(t, i.Document())), unasked(t))
	must(t, err)
	if strings.Contains(strings.Join(values(e), " "), "iamrole") || len(aws.Asked()) != before+1 {
		t.Errorf("IAM was asked: %q", aws.Asked())
	}
}

func TestAnInstanceOfAnotherAccountIsAskedAboutByARoleThere(t *testing.T) {
	aws, c := describing(t, started())
	c.Describe.AssumeRole = "hallmark"
	s := newServer(t, c, awsiid.Options{})
	for range 2 {
		_, err := s.Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t))
		must(t, err)
	}
	role := "ASIA-arn:aws:iam::123456789012:role/hallmark"
	want := []string{"AssumeRole AKIASERVER", "DescribeInstances " + role, "DescribeInstances " + role}
	if got := aws.Asked(); !slices.Equal(got, want) {
		t.Errorf("asked %q, want %q", got, want)
	}
}

func TestTheServersInstanceHasCredentials(t *testing.T) {
	i := started()
	i.Profile = "server"
	aws, c := describing(t, i)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	metadata := httptest.NewServer(aws.Metadata(t))
	defer metadata.Close()
	c.Describe.MetadataAddress = metadata.URL
	c.Describe.DisableInstanceProfileSelectors = true
	_, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, i.Document(), aws.Sign(t, i.Document())), unasked(t))
	must(t, err)
	if got := aws.Asked(); !slices.Equal(got, []string{"DescribeInstances ASIAINSTANCE"}) {
		t.Errorf("asked %q", got)
	}
}

// TestWhatTheAPISaysAgainstAnInstance goes through instances that the document
// alone would admit.
func TestWhatTheAPISaysAgainstAnInstance(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*harness.EC2Instance)
		want   string
	}{
		"gone":                    {func(i *harness.EC2Instance) { i.ID = "i-00000000000000000" }, "instance is gone"},
		"terminated":              {func(i *harness.EC2Instance) { i.State = "terminated" }, "not running"},
		"stopped":                 {func(i *harness.EC2Instance) { i.State = "stopped" }, "not running"},
		"root volume changed":     {func(i *harness.EC2Instance) { i.Moved = time.Hour }, "root volume"},
		"of another account":      {func(i *harness.EC2Instance) { i.Account = "999999999999" }, attestors.ErrUnavailable.Error()},
		"root volume put earlier": {func(i *harness.EC2Instance) { i.Moved = -time.Hour }, "root volume"},
	} {
		i := started()
		aws, config := describing(t, i)
		proof := payload(t, i.Document(), aws.Sign(t, i.Document()))
		c.change(&i)
		aws.Set(i)
		e, err := newServer(t, config, awsiid.Options{}).Verify(t.Context(), proof, unasked(t))
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

// TestAPIsThatFailAdmitNobody goes through answers that say nothing of an
// instance. The node is told to try again, and nothing of why.
func TestAPIsThatFailAdmitNobody(t *testing.T) {
	text := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			io.WriteString(w, body)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"an error":       text(500, ""),
		"a denial":       text(403, "<Response><Errors><Error><Code>UnauthorizedOperation</Code></Error></Errors></Response>"),
		"a page":         text(200, "<html><body>Sign in</body></html>"),
		"nothing":        text(200, ""),
		"half an answer": text(200, "<DescribeInstancesResponse><reservationSet>"),
		"another answer": text(200, "<GetInstanceProfileResponse/>"),
		"far too much":   text(200, strings.Repeat(" ", 2<<20)),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"a cut connection": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		aws, c := describing(t, started())
		aws.Break(h)
		_, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t))
		if !errors.Is(err, attestors.ErrUnavailable) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestWithoutCredentialsNobodyIsAdmitted(t *testing.T) {
	aws, c := describing(t, started())
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIASTRANGER")
	_, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t))
	if !errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("error is %v", err)
	}
}

// TestAgentsTakeNothingForADocument goes through what may answer at the address
// of the metadata service.
func TestAgentsTakeNothingForADocument(t *testing.T) {
	aws := harness.NewAWS(t, started())
	agent := newAgent(t, aws)
	for name, h := range map[string]http.HandlerFunc{
		"an error":     func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"version 1":    func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) },
		"a page":       func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html><body>Sign in</body></html>") },
		"nothing":      func(http.ResponseWriter, *http.Request) {},
		"JSON":         func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") },
		"far too much": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, strings.Repeat("x", 1<<20)) },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		"a cut answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half")
			panic(http.ErrAbortHandler)
		},
		"a cut connection": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		aws.Fail(h)
		if _, err := agent.Proof(t.Context()); err == nil {
			t.Errorf("%s: there is a proof", name)
		}
	}
	aws.Fail(nil)
	_, err := agent.Proof(t.Context())
	must(t, err)
	if _, err := agent.Respond(t.Context(), []byte("x")); err == nil {
		t.Error("a challenge is answered")
	}
}

func TestAnAgentGivesUpASilentService(t *testing.T) {
	aws := harness.NewAWS(t, started())
	agent := newAgent(t, aws)
	release := make(chan struct{})
	defer close(release)
	aws.Fail(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	if _, err := agent.Proof(t.Context()); err == nil || !strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("error is %v", err)
	}
}

// TestTheRegionsCertificatesAreAWSs checks what can be checked of them without
// AWS: that no letter of them is wrong.
func TestTheRegionsCertificatesAreAWSs(t *testing.T) {
	data, err := os.ReadFile("regions.pem")
	must(t, err)
	regions := 0
	for rest := data; ; regions++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		must(t, err)
		if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
			t.Errorf("certificate %d: %v", regions, err)
		}
		key, ok := cert.PublicKey.(*rsa.PublicKey)
		if !ok || key.N.BitLen() != 2048 || !slices.Contains(cert.Subject.Organization, "Amazon Web Services LLC") || cert.NotAfter.Year() < 2040 {
			t.Errorf("certificate %d is %v until %v", regions, cert.Subject, cert.NotAfter)
		}
		// Each can be named.
		name, _, _ := strings.Cut(strings.TrimSpace(string(data[:len(data)-len(rest)-len(pem.EncodeToMemory(block))])), "\x00")
		name = name[strings.LastIndex(name, "\n")+1:]
		if _, err := awsiid.New(awsiid.ServerConfig{AccountAllowList: []string{account}, RegionAllowList: []string{name}}, awsiid.Options{}); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	if regions < 39 {
		t.Errorf("there are %d regions", regions)
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	aws := harness.NewAWS(t, started())
	empty := filepath.Join(t.TempDir(), "empty.pem")
	must(t, os.WriteFile(empty, nil, 0o600))
	with := func(change func(*awsiid.ServerConfig)) awsiid.ServerConfig {
		c := trusting(aws)
		change(&c)
		return c
	}
	for name, c := range map[string]struct {
		config awsiid.ServerConfig
		want   string
	}{
		"nobody":             {awsiid.ServerConfig{}, "account_allow_list is missing"},
		"no account":         {with(func(c *awsiid.ServerConfig) { c.AccountAllowList = []string{"12345"} }), "has 12 digits"},
		"a wildcard":         {with(func(c *awsiid.ServerConfig) { c.AccountAllowList = []string{"*"} }), "has 12 digits"},
		"an unknown region":  {with(func(c *awsiid.ServerConfig) { c.RegionAllowList = []string{"xx-west-9"} }), "no certificate is known"},
		"no region":          {with(func(c *awsiid.ServerConfig) { c.Certificates[0].Region = "here" }), "region is"},
		"no file":            {with(func(c *awsiid.ServerConfig) { c.Certificates[0].Path = "/no" }), "/no"},
		"an empty file":      {with(func(c *awsiid.ServerConfig) { c.Certificates[0].Path = empty }), "no certificate in it"},
		"a region twice":     {with(func(c *awsiid.ServerConfig) { c.Certificates = append(c.Certificates, c.Certificates[0]) }), "twice"},
		"a negative age":     {with(func(c *awsiid.ServerConfig) { c.MaxAge = config.Duration(-time.Second) }), "negative"},
		"another's path":     {with(func(c *awsiid.ServerConfig) { c.AgentPathTemplate = "x/{{ .InstanceID }}" }), "does not begin with aws_iid/"},
		"tags unasked":       {with(func(c *awsiid.ServerConfig) { c.AgentPathTemplate = "aws_iid/{{ .Tags.Name }}" }), "add describe"},
		"an API in plain":    {with(func(c *awsiid.ServerConfig) { c.Describe = &awsiid.DescribeConfig{Endpoint: "http://10.0.0.1"} }), "not HTTPS"},
		"no API":             {with(func(c *awsiid.ServerConfig) { c.Describe = &awsiid.DescribeConfig{Endpoint: "ec2"} }), "no URL"},
		"a role's ARN":       {with(func(c *awsiid.ServerConfig) { c.Describe = &awsiid.DescribeConfig{AssumeRole: "arn:aws:iam::1:role/x"} }), "without its ARN"},
		"metadata with path": {with(func(c *awsiid.ServerConfig) { c.Describe = &awsiid.DescribeConfig{MetadataAddress: "http://x/latest"} }), "more than scheme"},
	} {
		if _, err := awsiid.New(c.config, awsiid.Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	for _, address := range []string{"169.254.169.254", "ftp://169.254.169.254", "http://", "http://u:p@x", "http://x/latest", "http://x?y"} {
		if _, err := awsiid.NewAgent(awsiid.AgentConfig{MetadataAddress: address}); err == nil {
			t.Errorf("the metadata service may be at %q", address)
		}
	}
}
