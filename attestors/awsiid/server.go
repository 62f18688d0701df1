package awsiid

import (
	"bytes"
	"context"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/agentpath"
	"github.com/hallmark-id/hallmark/attestors/cms"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/config"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// AccountAllowList are the AWS accounts, of 12 digits, whose instances may
	// attest. Required.
	AccountAllowList []string `yaml:"account_allow_list"`
	// RegionAllowList are the regions whose instances may attest. Default: all
	// whose certificates are known.
	RegionAllowList []string `yaml:"region_allow_list"`
	// MaxAge is how long after its instance was started a document is good.
	// Whoever copies the document of an instance that never attested can use it
	// until then. Default: for ever.
	MaxAge config.Duration `yaml:"max_age"`
	// AllowReattestation lets an instance attest that has an agent already. Every
	// process that can read the instance's metadata can then become its agent,
	// and so can whoever has a copy of the document. Default: an instance attests
	// once, until its agent is evicted.
	AllowReattestation bool `yaml:"allow_reattestation"`

	// Certificates are those by which AWS signs in regions that are not built in,
	// or that it has replaced. Default: those that AWS had published when this
	// program was made.
	Certificates []RegionCertificate `yaml:"certificates"`

	// Describe asks the EC2 API about each instance that attests. Without it
	// there are no selectors tag, sg and iamrole, and a document of an instance
	// that is gone is as good as any. Default: nothing is asked.
	Describe *DescribeConfig `yaml:"describe"`

	// AgentPathTemplate makes the path of an agent's SPIFFE ID after
	// /spire/agent/: a Go text/template that must begin with aws_iid/. It has
	// .PluginName, .AccountID, .Region, .AvailabilityZone, .InstanceID, .ImageID,
	// .InstanceType and, with describe, .Tags; besides Go's own functions lower,
	// replace, trimPrefix, trimSuffix and sha256sum. Default: {{ .PluginName
	// }}/{{ .AccountID }}/{{ .Region }}/{{ .InstanceID }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
}

// RegionCertificate is what documents of a region are verified by.
type RegionCertificate struct {
	// Region is the region, for example eu-central-1. Required.
	Region string `yaml:"region"`
	// Path is a PEM file of the certificates that AWS publishes for it, at most
	// 64 KiB. They take the place of the one that is built in. Read for each
	// attestation. Required.
	Path string `yaml:"path" env:"expand"`
}

const (
	defaultTemplate = "{{ .PluginName }}/{{ .AccountID }}/{{ .Region }}/{{ .InstanceID }}"
	maxListed       = 1000        // of each list; more is a mistake in writing
	maxCertificates = 64 << 10    // bytes of a file
	skew            = time.Minute // by which clocks may differ

	// verifyTime is how long the verification of a document may take, the EC2 API
	// included.
	verifyTime = 15 * time.Second
	// maxRunning is how many instances are asked about at once: an API that is
	// slow is not asked ever more.
	maxRunning = 32
	// logged is how many failures are logged before it is one a second.
	logged = 10
)

// regions.pem has the RSA-2048 certificates of
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/regions-certs.html, each
// below its region.
//
//go:embed regions.pem
var regionsPEM []byte

// builtIn are the certificates by region.
var builtIn = sync.OnceValues(func() (map[string]*x509.Certificate, error) { return parseRegions(regionsPEM) })

func parseRegions(data []byte) (map[string]*x509.Certificate, error) {
	out := make(map[string]*x509.Certificate)
	for rest := data; ; {
		before := rest
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out, nil
		}
		name, _, _ := bytes.Cut(bytes.TrimSpace(before), []byte("\n"))
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate of the region %s: %w", name, err)
		}
		out[string(name)] = cert
	}
}

// pathData is what a template is executed with.
type pathData struct {
	PluginName, AccountID, Region, AvailabilityZone, InstanceID, ImageID, InstanceType string
	Tags                                                                               map[string]string
}

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	c        ServerConfig
	o        Options
	files    map[string]string // of certificates, by region
	ec2      *ec2              // nil: not asked
	template *agentpath.Template
	running  *semaphore.Weighted
	loud     rate.Sometimes // that verification is not possible: any instance can make it be tried
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It fails if the configuration contradicts itself,
// or if a file of certificates cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		c: c, o: o, files: make(map[string]string),
		running: semaphore.NewWeighted(maxRunning), loud: rate.Sometimes{First: logged, Interval: time.Second},
	}
	for name, n := range map[string]int{
		"account_allow_list": len(c.AccountAllowList), "region_allow_list": len(c.RegionAllowList), "certificates": len(c.Certificates),
	} {
		if n > maxListed {
			return nil, fmt.Errorf("%s has %d items; the most is %d", name, n, maxListed)
		}
	}
	if len(c.AccountAllowList) == 0 {
		return nil, errors.New("account_allow_list is missing; name the AWS accounts whose instances may attest, as anybody can have one of their own")
	}
	for _, account := range c.AccountAllowList {
		if !accountForm.MatchString(account) {
			return nil, fmt.Errorf("account_allow_list has %q; an account ID has 12 digits, in quotes", account)
		}
	}
	if c.MaxAge < 0 {
		return nil, fmt.Errorf("max_age is %v; it cannot be negative", time.Duration(c.MaxAge))
	}
	known, err := builtIn()
	if err != nil {
		return nil, err
	}
	for _, one := range c.Certificates {
		if !regionForm.MatchString(one.Region) {
			return nil, fmt.Errorf("certificates: region is %q; write one like eu-central-1", one.Region)
		}
		if s.files[one.Region] != "" {
			return nil, fmt.Errorf("certificates: region %s is there twice; put all of its certificates into one file", one.Region)
		}
		if _, err := pemfile.Certificates(one.Path, maxCertificates); err != nil {
			return nil, fmt.Errorf("certificates: region %s: %w", one.Region, err)
		}
		s.files[one.Region] = one.Path
	}
	for _, region := range c.RegionAllowList {
		if known[region] == nil && s.files[region] == "" {
			return nil, fmt.Errorf("region_allow_list has %q, of which no certificate is known; add one by certificates", region)
		}
	}
	if c.Describe != nil {
		if s.ec2, err = newEC2(*c.Describe, o.Now); err != nil {
			return nil, fmt.Errorf("describe: %w", err)
		}
	}
	text := c.AgentPathTemplate
	if text == "" {
		text = defaultTemplate
	}
	if s.ec2 == nil && strings.Contains(text, ".Tags") {
		return nil, errors.New("agent_path_template has .Tags, which the EC2 API alone knows; add describe")
	}
	const word = "sample"
	s.template, err = agentpath.Parse(Name, text, pathData{Name, word, word, word, word, word, word, map[string]string{word: word}})
	if err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return s, nil
}

// Verify checks that AWS has signed the payload's document, of an instance that
// may attest.
func (s *Server) Verify(ctx context.Context, data []byte, _ func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	d, err := s.verify(data)
	if err == nil {
		err = s.admit(d)
	}
	var i *instance
	if err == nil && s.ec2 != nil {
		i, err = s.describe(ctx, d)
	}
	if cause := (unavailable{}); errors.As(err, &cause) {
		if ctx.Err() == nil { // the node still waits
			s.loud.Do(func() { s.o.Log.Error("aws_iid cannot attest nodes now", "error", cause.error) })
		}
		return nil, attestors.ErrUnavailable
	}
	if err != nil {
		return nil, err
	}
	path := pathData{Name, d.AccountID, d.Region, d.AvailabilityZone, d.InstanceID, d.ImageID, d.InstanceType, nil}
	values := []string{
		"account_id:" + d.AccountID,
		"region:" + d.Region,
		"az:" + d.AvailabilityZone,
		"instance:id:" + d.InstanceID,
		"image:id:" + d.ImageID,
	}
	if i != nil {
		path.Tags = i.tags
		values = append(values, i.selectors()...)
	}
	name, err := s.template.Path(path)
	if err != nil {
		return nil, fmt.Errorf("instance does not fit the agent_path_template: %w", err)
	}
	return &attestors.Evidence{
		Path:        name,
		Selectors:   attestors.SelectorsOf(Name, values),
		CanReattest: s.c.AllowReattestation,
		Once:        !s.c.AllowReattestation,
	}, nil
}

// unavailable is why a document cannot be verified, which is not the node's fault
// and none of its business.
type unavailable struct{ error }

// verify returns the payload's document as AWS has signed it.
func (s *Server) verify(data []byte) (*document, error) {
	p, err := parsePayload(data)
	if err != nil {
		return nil, err
	}
	// It says by which certificate it must be signed, and is not believed before.
	claimed, err := parseDocument([]byte(p.Document))
	if err != nil {
		return nil, err
	}
	certs, err := s.certificates(claimed.Region)
	if err != nil {
		return nil, err
	}
	message, err := cms.Parse(p.RSA2048)
	if err != nil {
		return nil, err
	}
	var signed []byte
	for _, cert := range certs {
		if signed, err = message.Verify(cert, s.o.Now()); err == nil {
			break
		}
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("document of the region %s: %w", claimed.Region, err)
	case string(signed) != p.Document:
		return nil, errors.New("the signature is of another document")
	}
	return claimed, nil
}

// certificates are those that documents of a region may be signed by; at least
// one.
func (s *Server) certificates(region string) ([]*x509.Certificate, error) {
	if path := s.files[region]; path != "" {
		certs, err := pemfile.Certificates(path, maxCertificates)
		if err != nil {
			return nil, unavailable{fmt.Errorf("certificates of the region %s: %w", region, err)}
		}
		return certs, nil
	}
	known, err := builtIn()
	if err != nil {
		return nil, unavailable{err}
	}
	if known[region] == nil {
		return nil, fmt.Errorf("document is of the region %q, whose certificate this server does not know", attestors.Clip(region))
	}
	return []*x509.Certificate{known[region]}, nil
}

// admit checks that a document's instance may attest.
func (s *Server) admit(d *document) error {
	now := s.o.Now()
	switch {
	case !slices.Contains(s.c.AccountAllowList, d.AccountID):
		return fmt.Errorf("instances of the account %s may not attest here", d.AccountID)
	case len(s.c.RegionAllowList) > 0 && !slices.Contains(s.c.RegionAllowList, d.Region):
		return fmt.Errorf("instances in the region %s may not attest here", d.Region)
	case d.PendingTime.After(now.Add(skew)):
		return errors.New("document is of an instance that is yet to be started; compare the clocks")
	case s.c.MaxAge > 0 && now.Sub(d.PendingTime) > time.Duration(s.c.MaxAge)+skew:
		return fmt.Errorf("instance was started %v ago, and may attest for %v only; stop and start it", now.Sub(d.PendingTime).Round(time.Second), time.Duration(s.c.MaxAge))
	}
	return nil
}

// describe asks the EC2 API about a document's instance.
func (s *Server) describe(ctx context.Context, d *document) (*instance, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	if err := s.running.Acquire(ctx, 1); err != nil {
		return nil, unavailable{fmt.Errorf("%d earlier attestations are not finished", maxRunning)}
	}
	defer s.running.Release(1)
	return s.ec2.describe(ctx, d)
}
