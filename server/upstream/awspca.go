package upstream

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/attestors/cloud"
)

// AWSPCAConfig is a CA of AWS Private CA. The credentials are those of the
// environment, or of the role of the EC2 instance that the server is on. They
// need acm-pca:DescribeCertificateAuthority, IssueCertificate and
// GetCertificate.
type AWSPCAConfig struct {
	// CertificateAuthorityARN of the CA. It is required.
	CertificateAuthorityARN string `yaml:"certificate_authority_arn" env:"expand"`
	// SigningAlgorithm is the CA's for certificates, like SHA256WITHECDSA. Default:
	// that which the CA itself was made with.
	SigningAlgorithm string `yaml:"signing_algorithm"`
	// Template is the ARN of the template of certificates. Default:
	// arn:PARTITION:acm-pca:::template/SubordinateCACertificate_PathLen0/V1, with
	// which no server can stand below this one.
	Template string `yaml:"template" env:"expand"`
	// Endpoint is the URL of what takes the place of AWS's: HTTPS, or HTTP on this
	// machine. Default: AWS's own, by the region of the CA.
	Endpoint string `yaml:"endpoint" env:"expand"`
	// MetadataAddress is the URL of the metadata service that has the server's
	// own credentials, without a path. Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

var arnForm = regexp.MustCompile(`^arn:[a-z0-9-]+:acm-pca:([a-z0-9-]+):[0-9]{12}:certificate-authority/[A-Za-z0-9-]+$`)

func (c *AWSPCAConfig) check() error {
	if !arnForm.MatchString(c.CertificateAuthorityARN) {
		return fmt.Errorf("aws_pca.certificate_authority_arn is %q; write it like arn:aws:acm-pca:REGION:ACCOUNT:certificate-authority/ID", c.CertificateAuthorityARN)
	}
	if c.Endpoint != "" {
		if _, err := cloud.CheckEndpoint(c.Endpoint); err != nil {
			return fmt.Errorf("aws_pca.endpoint: %w", err)
		}
	}
	return nil
}

const (
	pcaTemplate = "template/SubordinateCACertificate_PathLen0/V1"
	firstPoll   = 200 * time.Millisecond // until a certificate is asked for, and between
	lastPoll    = 3 * time.Second
)

// awsPCA is a CA of AWS Private CA.
type awsPCA struct {
	AWSPCAConfig
	region string
	api    *awsiid.API
	now    func() time.Time
}

func newAWSPCA(c AWSPCAConfig, now func() time.Time) (*awsPCA, error) {
	partition := strings.Split(c.CertificateAuthorityARN, ":")[1]
	c.Template = cmp.Or(c.Template, "arn:"+partition+":acm-pca:::"+pcaTemplate)
	api, err := awsiid.NewAPI(c.Endpoint, c.MetadataAddress, now)
	if err != nil {
		return nil, fmt.Errorf("aws_pca: %w", err)
	}
	return &awsPCA{c, arnForm.FindStringSubmatch(c.CertificateAuthorityARN)[1], api, now}, nil
}

// Name implements [authority.Upstream].
func (p *awsPCA) Name() (kind, address string) { return "aws_pca", p.CertificateAuthorityARN }

// Close implements [Upstream].
func (p *awsPCA) Close() error { return nil }

// Sign implements [authority.Upstream].
func (p *awsPCA) Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	algorithm := p.SigningAlgorithm
	if algorithm == "" {
		var described struct {
			CertificateAuthority struct {
				Status                            string
				CertificateAuthorityConfiguration struct{ SigningAlgorithm string }
			}
		}
		if err := p.ask(ctx, "DescribeCertificateAuthority", map[string]any{"CertificateAuthorityArn": p.CertificateAuthorityARN}, &described); err != nil {
			return nil, nil, err
		}
		if status := described.CertificateAuthority.Status; status != "ACTIVE" {
			return nil, nil, fmt.Errorf("the CA is not ACTIVE at AWS but %.40q", status)
		}
		algorithm = described.CertificateAuthority.CertificateAuthorityConfiguration.SigningAlgorithm
	}
	// The same request that comes twice makes one certificate.
	sum := sha256.Sum256(csr.Raw)
	var issued struct{ CertificateArn string }
	err = p.ask(ctx, "IssueCertificate", map[string]any{
		"CertificateAuthorityArn": p.CertificateAuthorityARN, "Csr": []byte(requestPEM(csr)), "SigningAlgorithm": algorithm,
		"TemplateArn": p.Template, "Validity": map[string]any{"Type": "ABSOLUTE", "Value": p.now().Add(lifetime).Unix()},
		"IdempotencyToken": hex.EncodeToString(sum[:])[:32],
	}, &issued)
	if err != nil {
		return nil, nil, err
	}
	var got struct{ Certificate, CertificateChain string }
	for wait := firstPoll; ; wait = min(2*wait, lastPoll) {
		err := p.ask(ctx, "GetCertificate", map[string]any{
			"CertificateAuthorityArn": p.CertificateAuthorityARN, "CertificateArn": issued.CertificateArn,
		}, &got)
		if err == nil {
			break
		}
		if refused := (*awsiid.APIError)(nil); !errors.As(err, &refused) || refused.Code != "RequestInProgressException" {
			return nil, nil, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, nil, fmt.Errorf("AWS has not made the certificate in time: %w", ctx.Err())
		}
	}
	certs, err := parsePEM(got.Certificate, got.CertificateChain)
	if err != nil {
		return nil, nil, err
	}
	chain, roots = split(certs)
	return chain, roots, nil
}

func (p *awsPCA) ask(ctx context.Context, action string, input map[string]any, into any) error {
	body, err := json.Marshal(input)
	if err != nil {
		return err
	}
	answer, err := p.api.AskJSON(ctx, p.region, "acm-pca", "ACMPrivateCA."+action, body, maxAnswer)
	if err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("%s: AWS answered with something else than JSON", action)
	}
	return nil
}
